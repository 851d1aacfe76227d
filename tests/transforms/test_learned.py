"""The learned transform of a unit: its rank, and that it is made from that unit's input and weights."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.calibration.walk import walk_blocks
from halfbyte.models.modules import head_dim, linear
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.quant_linear import InputScheme
from halfbyte.transforms import UnitStep
from halfbyte.transforms.learned import balance_heads_, learn_low_rank


def unit_of(source, step, group):
    return UnitStep(step, group, source.family, head_dim(source.config), Recipe(("learned",)), InputScheme())


def test_ranks_and_gain(tiny):
    source = copy.deepcopy(tiny("qwen2"))
    tokens = torch.randint(source.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    step = next(walk_blocks(source.model, source.family, tokens, device=source.device))
    step.observe([group[0] for group in source.family.groups])
    for group in source.family.groups:
        low_rank = learn_low_rank(unit_of(source, step, group))
        x, weight = torch.cat(step.seen[group[0]]), torch.cat([linear(step.original, part).weight for part in group])
        assert low_rank.rank == {128: 16, 256: 32}[x.shape[1]]
        powers = [float(rows.square().sum()) for rows in (x, weight, low_rank.forward(x), low_rank.backward(weight))]
        assert powers[2] * powers[3] < 0.97 * powers[0] * powers[1]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_heads_are_balanced_and_say_the_same(tiny, family):
    source = copy.deepcopy(tiny(family))
    tokens = torch.randint(source.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    step = next(walk_blocks(source.model, source.family, tokens, device=source.device))
    part, size = source.family.attention_out, head_dim(source.config)
    step.observe([group[0] for group in source.family.groups])
    before, outputs = torch.cat(step.seen[part]), [output.clone() for output in step.outputs]
    weight = linear(step.original, part).weight.clone()
    balance_heads_(unit_of(source, step, (part,)))
    after, folded = torch.cat(step.seen[part]), linear(step.original, part).weight
    assert torch.allclose(after @ folded.T, before @ weight.T, atol=1e-4)
    step.seen.clear()
    step.observe([part])
    assert torch.allclose(torch.cat(step.seen[part]), after, atol=1e-4)  # v gives it what was foreseen
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(step.outputs, outputs, strict=True))
    heads = after.shape[1] // size
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        powers = [float(rows[:, own].square().sum()) for rows in (before, weight, after, folded)]
        assert powers[2] * powers[3] < 1.05 * powers[0] * powers[1]
    powers = [float(rows.square().sum()) for rows in (before, weight, after, folded)]
    assert powers[2] * powers[3] < powers[0] * powers[1]
