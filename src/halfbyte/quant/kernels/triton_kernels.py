"""The Triton kernels for CUDA: what the torch reference beside each function's namesake computes, in one launch.

Decoding and activation rounding give the same bits as torch. The column loops of GPTQ keep a few rows in registers and
walk through all columns; their sums run in another order, so a code on the edge between two values may differ.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from halfbyte.quant.grids import Grid
from halfbyte.quant.kernels import Codes, bounds, is_table

ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds |x| < 2²² to even


@triton.jit
def rounded(x, low, high):
    """``x`` rounded half to even and clamped to integers; NaN stays NaN, and zero is +0."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)  # the bounds are integers: clamping first is the same
    return (x + ROUNDER) - ROUNDER


DECODE_BYTES = 1024  # per program: with 8 warps a thread reads 4 and writes 16 (bf16), without a shuffle between
DECODE_WARPS = 8


@triton.jit
def _e2m1(nibble):
    """Twice the e2m1 number that a nibble stands for, as an integer."""
    size = nibble & 7
    value = tl.where(size < 2, size, (2 | (size & 1)) << tl.maximum((size >> 1) - 1, 0))
    return tl.where(nibble > 7, -value, value)


@triton.jit
def _decode_kernel(packed, scales, out, total, GROUP: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Rows follow each other: a group never straddles two, so neither ``[out]`` nor ``[in]`` matters."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = start + tl.arange(0, BLOCK)
    inside = byte < total
    both = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    if EVEN:
        even, odd = ((both & 0xF) ^ 8) - 8, ((both >> 4) ^ 8) - 8  # sign of a nibble
    else:
        even, odd = _e2m1(both & 0xF), _e2m1(both >> 4)
    scale = tl.load(scales + 2 * byte // GROUP, mask=inside, other=0.0).to(tl.float32)
    if GROUP % 2 == 0:
        scale_odd = scale
    else:
        scale_odd = tl.load(scales + (2 * byte + 1) // GROUP, mask=inside, other=0.0).to(tl.float32)
    values = tl.interleave(even.to(tl.float32) * scale, odd.to(tl.float32) * scale_odd)
    column = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(out + column, values.to(out.dtype.element_ty), mask=column < 2 * total)


def decode_packed(packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, grid: Grid) -> torch.Tensor:
    """See :func:`halfbyte.quant.int4.decode_packed`."""
    packed, scales = packed.contiguous(), scales.contiguous()
    total = packed.numel()
    if total:
        _decode_kernel[(triton.cdiv(total, DECODE_BYTES),)](  # pyright: ignore[reportIndexIssue]
            packed,
            scales,
            out,
            total,
            GROUP=2 * total // scales.numel(),
            EVEN=grid.even,
            BLOCK=DECODE_BYTES,
            num_warps=DECODE_WARPS,
        )
    return out


TOKEN_BLOCK = 4096  # elements of a token at a time; a token may be longer


@triton.jit
def _fake_quantise_kernel(
    x, bits, result, tokens_per_row, length, a4_clip, MIXED: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    width = tl.load(bits + token // tokens_per_row) if MIXED else bits
    levels = (1 << width).to(tl.float32)
    clip = tl.where(width == 4, a4_clip, 1.0)
    start = token.to(tl.int64) * length
    column = tl.arange(0, BLOCK)

    low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)  # the range holds zero
    for at in range(0, length, BLOCK):
        value = tl.load(x + start + at + column, mask=at + column < length, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, value), tl.maximum(high, value)
    least, most = tl.min(low, axis=0), tl.max(high, axis=0)

    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-least, most) * clip, (levels - 1.0) * 0.5)
        scale = tl.where(scale > 0.0, scale, 1.0)
        bottom, top = -levels * 0.5, levels * 0.5 - 1.0
    else:
        scale = tl.div_rn((most - least) * clip, levels - 1.0)
        scale = tl.where(scale > 0.0, scale, 1.0)
        zero = rounded(tl.div_rn(-least * clip, scale), 0.0, 2.0 * levels)
        bottom, top = -zero, levels - 1.0 - zero  # of codes − zero point

    for at in range(0, length, BLOCK):
        inside = at + column < length
        value = tl.load(x + start + at + column, mask=inside, other=0.0).to(tl.float32)
        exact = tl.div_rn(value, scale)
        code = rounded(exact, bottom, top)
        if SYMMETRIC:
            code = tl.where(code == 0.0, exact * 0.0, code)  # what torch rounds to zero keeps its sign
        tl.store(result + start + at + column, (code * scale).to(result.dtype.element_ty), mask=inside)


def fake_quantise_rows(x: torch.Tensor, bits: int | torch.Tensor, a4_clip: float, symmetric: bool) -> torch.Tensor:
    """See :func:`halfbyte.quant.affine.fake_quantise_rows`."""
    x = x.contiguous()
    result = torch.empty_like(x)
    if not x.numel():
        return result
    mixed = isinstance(bits, torch.Tensor)
    bits = bits.contiguous() if mixed else bits
    length = x.shape[-1]
    tokens = x.numel() // length
    block = min(TOKEN_BLOCK, triton.next_power_of_2(length))
    _fake_quantise_kernel[(tokens,)](  # pyright: ignore[reportIndexIssue]
        x,
        bits,
        result,
        tokens // x.shape[0],
        length,
        float(a4_clip),
        MIXED=mixed,
        SYMMETRIC=symmetric,
        BLOCK=block,
        num_warps=8 if block == TOKEN_BLOCK else 4,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where torch rounds twice
    )
    return result


ROWS = 4  # of a matrix, per program


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
    """See :func:`halfbyte.quant.kernels.round_columns`; the block is a power of two wide."""
    rows, block = target.shape
    target, weight, step, mix = (tensor.contiguous() for tensor in (target, weight, step, mix))
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    low, high, table, values = _ends_and_table(bits, target)
    _round_kernel[(triton.cdiv(rows, ROWS),)](  # pyright: ignore[reportIndexIssue]
        target, weight, step, mix, codes, errors, rows, low, high, table, BLOCK=block, ROWS=ROWS, VALUES=values
    )
    return codes, errors


def descend_columns(
    pull: torch.Tensor, codes: torch.Tensor, step: torch.Tensor, hessian: torch.Tensor, bits: Codes
) -> torch.Tensor:
    """See :func:`halfbyte.quant.kernels.descend_columns`; the block is a power of two wide."""
    rows, block = pull.shape
    pull, codes, step, hessian = (tensor.contiguous() for tensor in (pull, codes, step, hessian))
    result = torch.empty_like(codes)
    low, high, table, values = _ends_and_table(bits, pull)
    _descend_kernel[(triton.cdiv(rows, ROWS),)](  # pyright: ignore[reportIndexIssue]
        pull, codes, step, hessian, result, rows, low, high, table, BLOCK=block, ROWS=ROWS, VALUES=values
    )
    return result


def _ends_and_table(bits: Codes, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Lowest and highest integer of each row, table of values (anything if there is none), how many values it has."""
    if is_table(bits):
        assert isinstance(bits, torch.Tensor)
        unused = like.new_zeros(len(like))
        return unused, unused, bits.to(like), len(bits)
    low, high = (torch.as_tensor(end, dtype=like.dtype, device=like.device) for end in bounds(bits))
    return low.expand(len(like)).contiguous(), high.expand(len(like)).contiguous(), like, 0
