"""One unit: measured errors are what they say, and ranges are chosen by output error."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.models.layers import layers_of
from halfbyte.prepare.recipe import A4_CLIPS, Recipe
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.affine import fake_quantise


def prepared(source, recipe):
    source = copy.deepcopy(source)
    tokens = torch.randint(source.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    return tokens, prepare_(source, tokens, recipe, device=source.device)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_mse_against_a_direct_computation(tiny, family):
    source = tiny(family)
    tokens, made = prepared(source, Recipe(group_size=32))
    name = "model.layers.1.mlp.down_proj"
    linear, seen = source.model.get_submodule(name), []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    source.model(tokens)
    handle.remove()
    x, decoded = seen[0].flatten(0, 1), made.codes.weights[name].decode()
    for bits, got in ((4, made.sensitivity[name].mse_low), (8, made.sensitivity[name].mse_high)):
        clip = made.layers[name].a4_clip if bits == 4 else 1.0
        direct = (fake_quantise(x, bits, clip=clip) @ decoded.T - x @ linear.weight.T).square().mean()
        assert got == pytest.approx(float(direct), rel=1e-3)
    assert made.sensitivity[name].power == pytest.approx(float((x @ linear.weight.T).square().mean()), rel=1e-3)
    assert list(made.sensitivity) == [layer.name for layer in layers_of(source.model, source.family)]
    assert all(row.ratio > 1 for row in made.sensitivity.values())


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_lower_the_error_of_four_bits(tiny, symmetric):
    """Ranges are compared with exact weights, so with 4-bit ones a layer may lose a little."""
    rows = {}
    for clip in (False, True):
        _, made = prepared(tiny("llama"), Recipe(group_size=32, clip=clip, symmetric=symmetric))
        rows[clip] = made.sensitivity
        clips = {entry.a4_clip for entry in made.layers.values()}
        assert clips <= set(A4_CLIPS) if clip else clips == {1.0}
        assert all(entry.a_symmetric == symmetric for entry in made.layers.values())
    better = [rows[True][name].mse_low / row.mse_low for name, row in rows[False].items()]
    assert max(better) < 1.05
    assert sum(better) / len(better) < 0.95
    assert all(row.mse_high == rows[False][name].mse_high for name, row in rows[True].items())


def test_layers_that_share_an_input_share_its_treatment(tiny):
    _, made = prepared(tiny("qwen2"), Recipe(("online", "learned"), group_size=32))
    for entry in made.layers.values():
        assert entry.rotated
    q, k, v = (made.layers[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv")
    assert (q.a4_clip, q.rank) == (k.a4_clip, k.rank) == (v.a4_clip, v.rank)
    assert "model.layers.0.self_attn.q_proj" in made.codes.low_rank
    assert "model.layers.0.self_attn.k_proj" not in made.codes.low_rank
