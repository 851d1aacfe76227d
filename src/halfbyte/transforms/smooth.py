"""Channel scales that move the spread of activations into the weights, or back (Xiao et al. 2023, arXiv:2211.10438).

Activations of a unit are divided by s, its weights multiplied. The division is folded into whatever makes the
activation: a norm, the rows of v_proj (per head, shared by the query heads of a group), the rows of up_proj.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.models.families import Family
from halfbyte.models.modules import linear


def smoothing_scales(x_absmax: torch.Tensor, w_absmax: torch.Tensor, alpha: float, floor: float = 1e-5) -> torch.Tensor:
    """SmoothQuant's own rule (its equation 4): ``max|X_j|^α / max|W_j|^(1−α)`` per channel; dead channels get 1."""
    x, w = x_absmax.float(), w_absmax.float()
    scales = x.clamp_min(floor).pow(alpha) / w.clamp_min(floor).pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), scales.clamp_min(floor), torch.ones_like(scales))


def shared_by_query_heads(channels: torch.Tensor, value_rows: int, head_dim: int) -> torch.Tensor:
    """Largest value per v_proj row among the query heads that read it, in o_proj's order, ``[in]`` -> ``[in]``."""
    heads = channels.view(value_rows // head_dim, -1, head_dim)  # [value heads, query heads per value head, head_dim]
    return heads.amax(dim=1, keepdim=True).expand_as(heads).flatten()


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
