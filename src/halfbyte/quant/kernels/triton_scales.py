"""Triton kernels for CUDA: the two searches for steps of groups in ``halfbyte.quant.ggml.block_scales``.

A program keeps some groups in registers and tries one step after the other; torch reads and writes them for every
operation of every try. Sums run in another order, so of two steps that are equally good the other may be chosen.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from halfbyte.quant.kernels.triton_kernels import rounded

PROGRAM = 2048  # weights per program


@triton.jit
def _whole(x, step, low, high):
    """``x / step`` as the nearest whole number from ``low`` to ``high``, any where ``step`` is 0."""
    safe = tl.where(step == 0.0, 1.0, step)
    return rounded(tl.div_rn(x, tl.broadcast_to(safe[:, None], x.shape)), low, high)


@triton.jit
def _symmetric_kernel(
    x,
    u,
    factors,
    chosen,
    result,
    groups,
    tries,
    again,
    low,
    high,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    TABLE: tl.constexpr,
):
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, N)[None, :]
    at = group.to(tl.int64)[:, None] * N + column
    inside = (group < groups)[:, None]
    values, costs = tl.load(x + at, mask=inside, other=0.0), tl.load(u + at, mask=inside, other=0.0)
    largest = tl.argmax(tl.abs(values), axis=1)
    extreme = tl.sum(tl.where(column == largest[:, None], values, 0.0), axis=1)
    weighed = costs * values
    best, explained = tl.zeros_like(extreme), tl.zeros_like(extreme)
    for k in range(tries + again):
        factor = tl.load(factors + k, mask=k < tries, other=0.0)
        step = tl.where(k < tries, extreme * factor, best)
        q = _whole(values, step, low, high)
        if TABLE:
            q = tl.load(chosen + (q - low).to(tl.int32))
        product, square = tl.sum(weighed * q, axis=1), tl.sum(costs * q * q, axis=1)
        held = tl.where(square > 0.0, square, 1.0)
        gain = tl.where(square > 0.0, tl.div_rn(product * product, held), 0.0)
        best = tl.where(gain > explained, tl.div_rn(product, held), best)
        explained = tl.maximum(gain, explained)
    tl.store(result + group, best, mask=group < groups)


def symmetric_steps(
    x: torch.Tensor,
    u: torch.Tensor,
    factors: torch.Tensor,
    low: int,
    high: int,
    chosen: torch.Tensor | None,
    again: int,
) -> torch.Tensor:
    """See :func:`halfbyte.quant.ggml.block_scales.symmetric_steps`.

    Args:
        x, u: groups of a power of two, fp32 ``[..., n]``.
        factors: of the value of largest size, to try.
        chosen: the number that each whole number from ``low`` to ``high`` becomes, or None.
        again: how often the best step is tried once more.
    """
    x, u = x.contiguous(), u.contiguous()
    best = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    groups, width = best.numel(), x.shape[-1]
    rows = max(1, PROGRAM // width)
    if groups:
        _symmetric_kernel[(triton.cdiv(groups, rows),)](  # pyright: ignore[reportIndexIssue]
            x,
            u,
            factors,
            x if chosen is None else chosen,
            best,
            groups,
            len(factors),
            again,
            float(low),
            float(high),
            N=width,
            ROWS=rows,
            TABLE=chosen is not None,
            enable_fp_fusion=False,
        )
    return best


@triton.jit
def _affine_kernel(
    x, u, shares, steps, starts, groups, tries, again, levels, FREE: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr
):
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = group.to(tl.int64)[:, None] * N + tl.arange(0, N)[None, :]
    inside = (group < groups)[:, None]
    values, costs = tl.load(x + at, mask=inside, other=0.0), tl.load(u + at, mask=inside, other=1.0)
    low, high = tl.min(values, axis=1), tl.max(values, axis=1)
    if not FREE:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    best = (high - low) / levels
    least, error = low, tl.zeros_like(low) + float("inf")
    total, first = tl.sum(costs, axis=1), tl.sum(costs * values, axis=1)
    for k in range(tries + again):
        share = tl.load(shares + k, mask=k < tries, other=0.0)
        step = tl.where(k < tries, (high - low) * share, best)
        start = tl.where(k < tries, low, least)
        q = _whole(values - start[:, None], step, 0.0, levels)
        weighed = costs * q
        mean, square = tl.sum(weighed, axis=1), tl.sum(weighed * q, axis=1)
        product = tl.sum(weighed * values, axis=1)
        spread = total * square - mean * mean
        slope = tl.div_rn(total * product - mean * first, tl.where(spread > 0.0, spread, 1.0))
        slope = tl.where(spread > 0.0, slope, step)
        offset = tl.div_rn(first - slope * mean, total)
        if not FREE:
            slope = tl.where(offset > 0.0, tl.div_rn(product, tl.maximum(square, 1e-30)), slope)
            offset = tl.minimum(offset, 0.0)
        missed = q * slope[:, None] + offset[:, None] - values
        cost = tl.sum(costs * missed * missed, axis=1)
        better = cost < error
        best, least = tl.where(better, slope, best), tl.where(better, offset, least)
        error = tl.minimum(cost, error)
    tl.store(steps + group, best, mask=group < groups)
    tl.store(starts + group, least, mask=group < groups)


def affine_steps(
    x: torch.Tensor, u: torch.Tensor, shares: torch.Tensor, levels: int, *, free: bool, again: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`halfbyte.quant.ggml.block_scales.affine_steps`.

    Args:
        x, u: groups of a power of two, fp32 ``[..., n]``.
        shares: of a group's range, to try as its step.
        again: how often the best step and value of code 0 are tried once more.
    """
    x, u = x.contiguous(), u.contiguous()
    steps = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    starts = torch.empty_like(steps)
    groups, width = steps.numel(), x.shape[-1]
    rows = max(1, PROGRAM // width)
    if groups:
        _affine_kernel[(triton.cdiv(groups, rows),)](  # pyright: ignore[reportIndexIssue]
            x,
            u,
            shares,
            steps,
            starts,
            groups,
            len(shares),
            again,
            float(levels),
            FREE=free,
            N=width,
            ROWS=rows,
            enable_fp_fusion=False,
        )
    return steps, starts
