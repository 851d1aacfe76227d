"""Channel scales moved between the layers of a block: what makes an activation is divided, what reads it multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.models.families import Family
from halfbyte.models.modules import linear


def fold_scales_(
    block: nn.Module, family: Family, group: Sequence[str], scales: torch.Tensor, *, head_dim: int
) -> None:
    """Divide the common input of the linears in ``group`` by ``scales`` ``[in]``, in the parameters of ``block``.

    For o_proj the scales must be the same for all query heads that share a value head.
    """
    norms = {readers: norm for norm, readers in family.norm_readers}
    group = tuple(group)
    if group in norms:
        _divide_(block.get_submodule(norms[group]), scales)
    elif group == (family.attention_out,):
        value = linear(block, family.value)
        heads = value.weight.shape[0] // head_dim
        _divide_(value, scales.view(heads, -1, head_dim)[:, 0].flatten())
    else:
        _divide_(linear(block, family.up), scales)
    for part in group:
        weight = linear(block, part).weight
        with torch.no_grad():
            weight.copy_(weight.float() * scales)


def _divide_(module: nn.Module, scales: torch.Tensor) -> None:
    """Divide the outputs of a norm or linear layer by ``scales`` ``[out]``, in its parameters."""
    for parameter in module.parameters(recurse=False):
        divisor = scales.view(-1, *([1] * (parameter.dim() - 1)))
        with torch.no_grad():
            parameter.copy_(parameter.float() / divisor)
