"""Triton twin of :mod:`halfbyte.quant.kernels.activations`: the rule of :mod:`halfbyte.quant.affine`, step by step."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from halfbyte.quant.kernels.columns_triton import rounded

LARGEST_BLOCK = 4096  # elements of a token at a time; a token may be longer


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
    """See :func:`halfbyte.quant.kernels.activations.fake_quantise_rows`."""
    x = x.contiguous()
    result = torch.empty_like(x)
    if not x.numel():
        return result
    mixed = isinstance(bits, torch.Tensor)
    bits = bits.contiguous() if mixed else bits
    length = x.shape[-1]
    tokens = x.numel() // length
    block = min(LARGEST_BLOCK, triton.next_power_of_2(length))
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
        num_warps=8 if block == LARGEST_BLOCK else 4,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where torch rounds twice
    )
    return result
