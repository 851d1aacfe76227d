"""Triton twins of :mod:`halfbyte.quant.kernels.columns`."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from halfbyte.quant.kernels.columns import Codes, bounds, is_table

ROWS = 4  # per program
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds |x| < 2²² to even


@triton.jit
def rounded(x, low, high):
    """``x`` rounded half to even and clamped to integers; NaN stays NaN, and zero is +0."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)  # the bounds are integers: clamping first is the same
    return (x + ROUNDER) - ROUNDER


@triton.jit
def nearest(x, low, high, table, VALUES: tl.constexpr):
    """``x`` as the nearest integer from ``low`` to ``high``, or as the nearest of ``VALUES`` ascending ones."""
    if VALUES == 0:
        return rounded(x, low, high)
    below = tl.load(table)
    found = tl.zeros_like(x) + below
    for k in tl.static_range(1, VALUES):
        above = tl.load(table + k)
        found = tl.where(x > (above + below) / 2, above, found)
        below = above
    return found


@triton.jit
def _round_kernel(
    target,
    weight,
    step,
    mix,
    codes,
    errors,
    rows,
    low,
    high,
    table,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * BLOCK + column[None, :]
    inside = (row < rows)[:, None]
    lowest = tl.load(low + row, mask=row < rows, other=0.0)
    highest = tl.load(high + row, mask=row < rows, other=0.0)
    wanted = tl.load(target + at, mask=inside, other=0.0)
    original = tl.load(weight + at, mask=inside, other=0.0)
    width = tl.load(step + at, mask=inside, other=1.0)
    code, error = tl.zeros_like(wanted), tl.zeros_like(wanted)
    for k in range(BLOCK):
        here = column[None, :] == k
        w = tl.sum(tl.where(here, wanted, 0.0), axis=1)
        s = tl.sum(tl.where(here, width, 0.0), axis=1)
        q = nearest(tl.div_rn(w, s), lowest, highest, table, VALUES)
        e = tl.sum(tl.where(here, original, 0.0), axis=1) - q * s
        wanted += e[:, None] * tl.load(mix + k * BLOCK + column)[None, :]
        code = tl.where(here, q[:, None], code)
        error = tl.where(here, e[:, None], error)
    tl.store(codes + at, code, mask=inside)
    tl.store(errors + at, error, mask=inside)


@triton.jit
def _descend_kernel(
    pull,
    codes,
    step,
    hessian,
    result,
    rows,
    low,
    high,
    table,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * BLOCK + column[None, :]
    inside = (row < rows)[:, None]
    lowest = tl.load(low + row, mask=row < rows, other=0.0)
    highest = tl.load(high + row, mask=row < rows, other=0.0)
    force = tl.load(pull + at, mask=inside, other=0.0)
    code = tl.load(codes + at, mask=inside, other=0.0)
    width = tl.load(step + at, mask=inside, other=1.0)
    for k in range(BLOCK):
        here = column[None, :] == k
        line = tl.load(hessian + k * BLOCK + column)
        diagonal = tl.load(hessian + k * BLOCK + k)
        s = tl.sum(tl.where(here, width, 0.0), axis=1)
        now = tl.sum(tl.where(here, code, 0.0), axis=1)
        best = now + tl.div_rn(tl.div_rn(tl.sum(tl.where(here, force, 0.0), axis=1), diagonal), s)
        new = nearest(best, lowest, highest, table, VALUES)
        force -= ((new - now) * s)[:, None] * line[None, :]
        code = tl.where(here, new[:, None], code)
    tl.store(result + at, code, mask=inside)


def round_columns(
    target: torch.Tensor, weight: torch.Tensor, step: torch.Tensor, mix: torch.Tensor, bits: Codes
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`halfbyte.quant.kernels.columns.round_columns`; the block is a power of two wide."""
    rows, block = target.shape
    target, weight, step, mix = (tensor.contiguous() for tensor in (target, weight, step, mix))
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    low, high, table, values = _codes(bits, target)
    _round_kernel[(triton.cdiv(rows, ROWS),)](  # pyright: ignore[reportIndexIssue]
        target, weight, step, mix, codes, errors, rows, low, high, table, BLOCK=block, ROWS=ROWS, VALUES=values
    )
    return codes, errors


def descend_columns(
    pull: torch.Tensor, codes: torch.Tensor, step: torch.Tensor, hessian: torch.Tensor, bits: Codes
) -> torch.Tensor:
    """See :func:`halfbyte.quant.kernels.columns.descend_columns`; the block is a power of two wide."""
    rows, block = pull.shape
    pull, codes, step, hessian = (tensor.contiguous() for tensor in (pull, codes, step, hessian))
    result = torch.empty_like(codes)
    low, high, table, values = _codes(bits, pull)
    _descend_kernel[(triton.cdiv(rows, ROWS),)](  # pyright: ignore[reportIndexIssue]
        pull, codes, step, hessian, result, rows, low, high, table, BLOCK=block, ROWS=ROWS, VALUES=values
    )
    return result


def _codes(bits: Codes, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Lowest and highest integer of each row, table of values (anything if there is none), how many values it has."""
    if is_table(bits):
        assert isinstance(bits, torch.Tensor)
        unused = like.new_zeros(len(like))
        return unused, unused, bits.to(like), len(bits)
    low, high = (torch.as_tensor(end, dtype=like.dtype, device=like.device) for end in bounds(bits))
    return low.expand(len(like)).contiguous(), high.expand(len(like)).contiguous(), like, 0
