"""Channel scales are chosen by what they do to the output."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.calibration.walk import sample, walk_blocks
from halfbyte.models.modules import head_dim, linear
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.affine import fake_quantise
from halfbyte.quant.quant_linear import InputScheme
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.transforms import TRANSFORMS, UnitStep


def first_step(source):
    tokens = torch.randint(source.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    step = next(walk_blocks(source.model, source.family, tokens, device=source.device))
    step.observe([group[0] for group in source.family.groups])
    return step


def scaled(source, step, group, recipe, scheme=None):
    """What is chosen for a unit, after it was folded."""
    unit = UnitStep(step, group, source.family, head_dim(source.config), recipe, scheme or InputScheme())
    TRANSFORMS["smooth"].fold_unit_(unit)
    return unit.scales


def output_error(step, group, expected, scheme):
    """Mean squared error with A4 and rounded W4."""
    x = torch.cat(step.seen[group[0]])
    weight = scheme.stored_weight(torch.cat([linear(step.original, part).weight for part in group]))
    got = fake_quantise(scheme.transform(x), 4) @ round_to_nearest(weight, 32).decode().T
    return float((got - expected).square().mean())


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("weights", ["rtn", "awq"])
def test_outliers_choose_scales_that_help(tiny, weights, rotated):
    source = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for name in ("input_layernorm", "post_attention_layernorm"):
            source.model.get_submodule(f"model.layers.0.{name}").weight[:3] *= 30
    step, scheme = first_step(source), InputScheme(rotated)
    recipe = Recipe(("smooth",), weights, group_size=32)
    for group in source.family.groups:
        weight = torch.cat([linear(step.original, part).weight for part in group])
        expected = torch.cat(step.seen[group[0]]) @ weight.T
        before = output_error(step, group, expected, scheme)
        name = scaled(source, step, group, recipe, scheme)
        assert name.startswith("AWQ" if weights == "awq" else ("rms", "absmax", "none"))
        after = output_error(step, group, expected, scheme)
        if group in dict(map(reversed, source.family.norm_readers)):
            assert name != "none"
            assert after < before / 2
        else:
            assert after < before * 1.1


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_what_was_seen_follows_what_is_folded(tiny, family):
    source = copy.deepcopy(tiny(family))
    step = first_step(source)
    for group in source.family.groups:
        scaled(source, step, group, Recipe(("smooth",)))
        known = torch.cat(step.seen.pop(group[0]))
        step.observe([group[0]])
        assert float((torch.cat(step.seen[group[0]]) - known).norm() / known.norm()) < 1e-4


def test_a_given_alpha_is_not_discussed(tiny):
    source = copy.deepcopy(tiny("qwen2"))
    step, recipe = first_step(source), Recipe(("smooth",), alpha=0.3)
    assert {scaled(source, step, group, recipe) for group in source.family.groups} == {"absmax 0.3"}


def test_samples_are_spread_over_all_batches():
    batches = list(torch.arange(100.0).view(4, 25, 1))
    assert sample(batches, 10, torch.device("cpu")).flatten().tolist() == [0, 10, 20, 25, 35, 45, 50, 60, 70, 75]
    assert len(sample(batches, 1000, torch.device("cpu"))) == 100
