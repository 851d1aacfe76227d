"""The learned transform of a unit: its rank, and that it is made from that unit's input and weights."""

from __future__ import annotations

import copy

import torch

from halfbyte.calibration.twins import walk_twins
from halfbyte.models.modules import linear
from halfbyte.prepare.learned import learn_low_rank


def test_ranks_and_gain(tiny):
    source = copy.deepcopy(tiny("qwen2"))
    tokens = torch.randint(source.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    step = next(walk_twins(source.model, source.family, tokens, device=source.device))
    step.observe([group[0] for group in source.family.groups])
    for group in source.family.groups:
        low_rank = learn_low_rank(step, group)
        x, weight = torch.cat(step.seen[group[0]]), torch.cat([linear(step.original, part).weight for part in group])
        assert low_rank.rank == {128: 8, 256: 16}[x.shape[1]]
        powers = [float(rows.square().sum()) for rows in (x, weight, low_rank.forward(x), low_rank.backward(weight))]
        assert powers[2] * powers[3] < 0.97 * powers[0] * powers[1]
