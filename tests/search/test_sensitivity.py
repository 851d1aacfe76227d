"""Layer sensitivity: the errors are what they say, and A4 costs more than A8."""

from __future__ import annotations

import pytest
import torch

from halfbyte.calibration.blocks import walk_blocks
from halfbyte.calibration.gradients import output_gradient_power
from halfbyte.models.loading import layers_of, units_of
from halfbyte.numerics.affine import fake_quantise
from halfbyte.search.sensitivity import LayerSensitivity, measure_block, unit_errors, unit_ratios
from halfbyte.weights.rtn import round_to_nearest
from tests.tiny_models import FAMILIES


def tokens_for(source, windows=2):
    return torch.randint(source.config.vocab_size, (windows, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_mse_against_a_direct_computation(tiny, family):
    source = tiny(family)
    tokens = tokens_for(source)
    layers = layers_of(source.model, source.family)
    name = "model.layers.1.mlp.down_proj"
    seen = []
    linear = source.model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    source.model(tokens)
    handle.remove()
    x = seen[0].flatten(0, 1)
    coded = round_to_nearest(linear.weight, 32)
    rows = {}
    for step in walk_blocks(source.model, source.family, tokens, device=source.device):
        members = {layer.name.split(".", 3)[3]: layer for layer in layers if layer.block == step.index}
        codes = {part: round_to_nearest(step.block.get_submodule(part).weight, 32) for part in members}
        rows.update({row.layer: row for row in measure_block(step, members, codes)})
    assert len(rows) == len(layers)
    for bits, got in ((4, rows[name].mse_a4), (8, rows[name].mse_a8)):
        direct = (fake_quantise(x, bits) @ coded.decode().T - x @ linear.weight.T).square().mean()
        assert got == pytest.approx(float(direct), rel=1e-3)
    assert all(row.ratio > 1 for row in rows.values())


def test_units_take_the_largest_ratio_and_the_sum_of_errors(tiny):
    source = tiny("llama")
    layers = layers_of(source.model, source.family)
    units = units_of(layers, source.family, "fused")
    rows = {layer.name: LayerSensitivity(layer.name, 1.0 + index, 1.0, 1.0, 2.0) for index, layer in enumerate(layers)}
    assert unit_ratios(units, rows)[0] == 3.0
    q, k, v = layers[:3]
    table = unit_errors(units, rows, "fisher")[0]
    assert table[4] == 2.0 * (q.out_features * 1 + k.out_features * 2 + v.out_features * 3)
    table = unit_errors(units, rows, "mse")[0]
    assert table[8] == pytest.approx((q.macs + k.macs + v.macs) / sum(layer.macs for layer in layers))


def test_gradient_power_predicts_the_loss(tiny):
    """g² at an output is the squared slope of the loss: compare with a finite difference."""
    source = tiny("llama")
    tokens = tokens_for(source, windows=1)
    layers = layers_of(source.model, source.family)
    power = list(output_gradient_power(source.model, layers, tokens))[-1]
    assert all(value > 0 for value in power.values())

    def loss(name, direction):
        handle = source.model.get_submodule(name).register_forward_hook(lambda _, __, out: out + direction)
        with torch.no_grad():
            logits = source.model(tokens).logits[0, :-1]
        handle.remove()
        return float(torch.nn.functional.cross_entropy(logits.double(), tokens[0, 1:], reduction="sum"))

    name, slopes = "model.layers.1.mlp.down_proj", []
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        direction = 1e-2 * torch.randn(1, 24, 128, generator=generator)
        slopes.append((loss(name, direction) - loss(name, -direction)) / 2e-2)
    # Var(g·ε) = Σ g² for standard normal ε
    measured = sum(slope**2 for slope in slopes) / len(slopes) / (24 * 128)
    assert measured == pytest.approx(power[name], rel=0.6)
