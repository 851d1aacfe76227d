"""Affine transforms from second moments: low-rank in front of a unit, and whole between v and o, where it folds.

What FlatQuant (Sun et al. 2024, arXiv:2410.09426) learns by gradient descent has a closed form if rounding noise is
spread evenly by a rotation: see :mod:`halfbyte.quant.balance`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.models.modules import linear
from halfbyte.quant.balance import LowRank, balancing_matrices, low_rank_balance
from halfbyte.transforms import Transform, UnitStep
from halfbyte.transforms._rotation import transform_heads_

RANK_SHARE, LARGEST_RANK = 8, 256


class Learned(Transform):
    """See the module."""

    order = 60
    at_run_time = True
    can_be_repeated = False

    def fold_unit_(self, unit: UnitStep) -> None:
        """Balance the heads in front of o, then the unit's input against its weights."""
        if unit.reads_heads:
            balance_heads_(unit)
        unit.scheme = replace(unit.scheme, low_rank=learn_low_rank(unit))


TRANSFORM = Learned()


def rank_for(inputs: int) -> int:
    """The rank for an input of that width: an eighth of it, at most 256, even."""
    return max(2, min(LARGEST_RANK, inputs // RANK_SHARE) // 2 * 2)


def learn_low_rank(unit: UnitStep) -> LowRank:
    """The transform of a unit's input."""
    weight = torch.cat([linear(unit.step.original, part).weight for part in unit.group])
    inputs = weight.shape[1]
    x_moment = weight.new_zeros(inputs, inputs)
    for batch in unit.step.seen[unit.group[0]]:
        rows = batch.to(weight.device)
        x_moment.addmm_(rows.T, rows)
    made = low_rank_balance(unit.step.group.sum_(x_moment), weight.T @ weight, rank_for(inputs))
    return LowRank(*unit.step.group.first_rows([made.basis, made.gain]))


def balance_heads_(unit: UnitStep) -> None:
    """Fold into v and o, per key/value head, the transform that gives o's input and weights the same spread.

    What was seen of o's input is changed with it. Nothing is left for run time.
    """
    step, family, head_dim = unit.step, unit.family, unit.head_dim
    out = linear(step.original, family.attention_out).weight
    heads = linear(step.original, family.value).weight.shape[0] // head_dim
    seen = step.seen[family.attention_out]

    def by_head(rows: torch.Tensor) -> torch.Tensor:  # [rows, in] -> [heads, rows * query heads per head, head_dim]
        return rows.to(out.device).view(len(rows), heads, -1, head_dim).transpose(0, 1).flatten(1, 2)

    x_moment = sum((by_head(batch).mT @ by_head(batch) for batch in seen), out.new_zeros(heads, head_dim, head_dim))
    step.group.sum_(x_moment)
    w_moment = by_head(out).mT @ by_head(out)
    used = (x_moment.diagonal(dim1=1, dim2=2).sum(1) > 0) & (w_moment.diagonal(dim1=1, dim2=2).sum(1) > 0)
    eye = torch.eye(head_dim, device=out.device)
    forward, backward = (
        torch.where(used[:, None, None], matrix, eye) for matrix in balancing_matrices(x_moment, w_moment)
    )
    forward, backward = step.group.first_rows([forward, backward])
    transform_heads_(step.original, family, forward, backward, head_dim)
    step.seen[family.attention_out] = [
        torch.einsum("thgd,hed->thge", batch.to(out.device).view(len(batch), heads, -1, head_dim), forward)
        .reshape(batch.shape)
        .to(batch.device)
        for batch in seen
    ]
