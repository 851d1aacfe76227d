"""Channel scales that move the spread of activations into the weights, or back (Xiao et al. 2023, arXiv:2211.10438).

Activations of a unit are divided by s, its weights multiplied. The division is folded into whatever makes the
activation: a norm, the rows of v_proj (per head, shared by the query heads of a group), the rows of up_proj.
"""

from __future__ import annotations

import torch


def smoothing_scales(x_absmax: torch.Tensor, w_absmax: torch.Tensor, alpha: float, floor: float = 1e-5) -> torch.Tensor:
    """SmoothQuant's own rule (its equation 4): ``max|X_j|^α / max|W_j|^(1−α)`` per channel; dead channels get 1."""
    x, w = x_absmax.float(), w_absmax.float()
    scales = x.clamp_min(floor).pow(alpha) / w.clamp_min(floor).pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), scales.clamp_min(floor), torch.ones_like(scales))


def shared_by_query_heads(channels: torch.Tensor, value_rows: int, head_dim: int) -> torch.Tensor:
    """Largest value per v_proj row among the query heads that read it, in o_proj's order, ``[in]`` -> ``[in]``."""
    heads = channels.view(value_rows // head_dim, -1, head_dim)  # [value heads, query heads per value head, head_dim]
    return heads.amax(dim=1, keepdim=True).expand_as(heads).flatten()
