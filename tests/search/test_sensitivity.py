"""What units make of their layers' errors; loss gradients."""

from __future__ import annotations

import pytest
import torch

from halfbyte.models.layers import layers_of, units_of
from halfbyte.search.sensitivity import LayerSensitivity, output_gradient_power, unit_errors, unit_ratios


def tokens_for(source, windows=2):
    return torch.randint(source.config.vocab_size, (windows, 24), generator=torch.Generator().manual_seed(0))


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
