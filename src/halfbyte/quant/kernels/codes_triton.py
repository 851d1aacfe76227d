"""Triton twin of :mod:`halfbyte.quant.kernels.codes`."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

BLOCK = 1024  # bytes per program: with 8 warps a thread reads 4 and writes 16 (bf16), without a shuffle between
WARPS = 8


@triton.jit
def _decode_kernel(packed, scales, out, total, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Rows follow each other: a group never straddles two, so neither ``[out]`` nor ``[in]`` matters."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = start + tl.arange(0, BLOCK)
    inside = byte < total
    both = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    even, odd = ((both & 0xF) ^ 8) - 8, ((both >> 4) ^ 8) - 8  # sign of a nibble
    scale = tl.load(scales + 2 * byte // GROUP, mask=inside, other=0.0).to(tl.float32)
    if GROUP % 2 == 0:
        scale_odd = scale
    else:
        scale_odd = tl.load(scales + (2 * byte + 1) // GROUP, mask=inside, other=0.0).to(tl.float32)
    values = tl.interleave(even.to(tl.float32) * scale, odd.to(tl.float32) * scale_odd)
    column = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(out + column, values.to(out.dtype.element_ty), mask=column < 2 * total)


def decode_packed(packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See :func:`halfbyte.quant.kernels.codes.decode_packed`."""
    packed, scales = packed.contiguous(), scales.contiguous()
    total = packed.numel()
    if total:
        _decode_kernel[(triton.cdiv(total, BLOCK),)](  # pyright: ignore[reportIndexIssue]
            packed, scales, out, total, GROUP=2 * total // scales.numel(), BLOCK=BLOCK, num_warps=WARPS
        )
    return out
