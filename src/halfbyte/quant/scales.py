"""Group scales by output error instead of by the largest weight."""

from __future__ import annotations

import torch

from halfbyte.quant.int4 import ANY_FP16, ScaleRule, absmax_scales

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


def searched_scales(
    weight: torch.Tensor,
    group_size: int,
    importance: torch.Tensor,
    bits: int = 4,
    *,
    rule: ScaleRule = ANY_FP16,
    where: object = "weight",
) -> torch.Tensor:
    """fp16 scales ``[out, in / group_size]`` with the least ``Σ importance_j (w_j − ŵ_j)²`` per group.

    Tried are ``RATIOS`` of the absmax scale, and of absmax / 2^(bits − 1) with the sign that puts the largest weight on
    the lowest code: the symmetric grid has one more code on that side, and a negative scale turns it around (as ggml's
    Q4_0 does). Where ``rule`` forbids negative scales, its size is tried.

    Args:
        weight: ``[out, in]``.
        importance: what an error in each input channel costs, ``[in]``: the diagonal of the Hessian.
    """
    top = 2 ** (bits - 1) - 1
    full = absmax_scales(weight, group_size, bits, rule=rule, where=where)
    grouped = weight.float().reshape(weight.shape[0], -1, group_size)  # [out, groups, group]
    cost = importance.float().view(-1, group_size)
    largest = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    lowest = rule.rounded((-largest if rule.signed else largest.abs()) / (top + 1))
    best = full.clone()
    least = torch.full(full.shape, float("inf"), device=weight.device)
    for start in (full, lowest):
        for ratio in RATIOS:
            scales = rule.rounded(start.float() * ratio)
            step = scales.float().unsqueeze(-1)
            safe = torch.where(step == 0, torch.ones_like(step), step)
            error = (grouped / safe).round_().clamp_(-top - 1, top).mul_(step).sub_(grouped)
            total = torch.einsum("ogk,gk->og", error.square_(), cost)
            better = total < least
            best, least = torch.where(better, scales, best), torch.where(better, total, least)
    return best
