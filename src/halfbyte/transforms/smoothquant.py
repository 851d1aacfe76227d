"""SmoothQuant: move the spread of activations into the weights (Xiao et al. 2023, arXiv:2211.10438, eq. 4).

For an input channel j: ``s_j = max|X_j|^α / max|W_j|^(1−α)``; activations are divided by s, weights multiplied.
The division is folded into whatever makes the activation: a norm, the rows of v_proj (per head, shared by the query
heads of a group), the rows of up_proj.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.models.archs import Family
from halfbyte.models.modules import linear


def smoothing_scales(x_absmax: torch.Tensor, w_absmax: torch.Tensor, alpha: float, floor: float = 1e-5) -> torch.Tensor:
    """Scales ``[channels]`` from the largest |activation| and |weight| of every channel; dead channels get 1."""
    x, w = x_absmax.float(), w_absmax.float()
    scales = x.clamp_min(floor).pow(alpha) / w.clamp_min(floor).pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), scales.clamp_min(floor), torch.ones_like(scales))


def smooth_block_(
    block: nn.Module, family: Family, x_absmax: dict[str, torch.Tensor], *, alpha: float, head_dim: int
) -> None:
    """Fold smoothing scales into one block, in place.

    Args:
        x_absmax: path of a linear in the block -> largest |input| per channel ``[in]``.
        alpha: 0 leaves activations alone, 1 moves all of their spread into the weights.
        head_dim: channels per attention head.
    """
    for norm, readers in family.norm_readers:
        linears = [linear(block, reader) for reader in readers]
        scales = smoothing_scales(x_absmax[readers[0]], _column_absmax(linears), alpha)
        _divide_(block.get_submodule(norm), scales)
        _multiply_columns_(linears, scales)

    value, out = linear(block, family.value), linear(block, family.attention_out)
    shared = _max_over_query_groups(x_absmax[family.attention_out], value.weight.shape[0], head_dim)
    shared_w = _max_over_query_groups(_column_absmax([out]), value.weight.shape[0], head_dim)
    scales = smoothing_scales(shared, shared_w, alpha)
    _divide_(value, scales)
    _multiply_columns_([out], _repeat_over_query_groups(scales, out.weight.shape[1], head_dim))

    up, down = linear(block, family.up), linear(block, family.down)
    scales = smoothing_scales(x_absmax[family.down], _column_absmax([down]), alpha)
    _divide_(up, scales)
    _multiply_columns_([down], scales)


def _column_absmax(linears: Sequence[nn.Linear]) -> torch.Tensor:
    return torch.stack([layer.weight.float().abs().amax(dim=0) for layer in linears]).amax(dim=0)  # [in]


def _max_over_query_groups(channels: torch.Tensor, value_rows: int, head_dim: int) -> torch.Tensor:
    """``[query_heads * head_dim]`` -> ``[value_heads * head_dim]``: query heads of a group share one value head."""
    value_heads = value_rows // head_dim
    return channels.view(value_heads, -1, head_dim).amax(dim=1).flatten()


def _repeat_over_query_groups(scales: torch.Tensor, columns: int, head_dim: int) -> torch.Tensor:
    per_group = columns // scales.numel()
    return scales.view(-1, 1, head_dim).expand(-1, per_group, -1).flatten()


def _divide_(module: nn.Module, scales: torch.Tensor) -> None:
    """Divide the outputs of a norm or linear layer by ``scales`` ``[out]``, in its parameters."""
    for parameter in module.parameters(recurse=False):
        divisor = scales.view(-1, *([1] * (parameter.dim() - 1)))
        with torch.no_grad():
            parameter.copy_(parameter.float() / divisor)


def _multiply_columns_(linears: Sequence[nn.Linear], scales: torch.Tensor) -> None:
    for layer in linears:
        with torch.no_grad():
            layer.weight.copy_(layer.weight.float() * scales)
