"""A low-rank affine transform in front of a unit, computed from second moments.

What FlatQuant (Sun et al. 2024, arXiv:2410.09426) learns by gradient descent has a closed form if rounding noise is
spread evenly by a rotation: see :mod:`halfbyte.numerics.balance`.
"""

from __future__ import annotations

import torch

from halfbyte.calibration.twins import TwinStep
from halfbyte.models.modules import linear
from halfbyte.numerics.balance import LowRank, low_rank_balance

RANK_SHARE, LARGEST_RANK = 4, 512


def learn_low_rank(step: TwinStep, group: tuple[str, ...]) -> LowRank:
    """The transform of a unit's input, of rank in / 4 and at most 512."""
    weight = torch.cat([linear(step.original, part).weight for part in group])
    inputs = weight.shape[1]
    rank = max(2, min(LARGEST_RANK, inputs // RANK_SHARE) // 2 * 2)
    x_moment = weight.new_zeros(inputs, inputs)
    for batch in step.seen[group[0]]:
        x_moment.addmm_(batch.T, batch)
    return low_rank_balance(x_moment, weight.T @ weight, rank)
