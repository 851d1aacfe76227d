"""Activation quantisation with one width per row of a batch: candidates that differ only in bits share one pass."""

from __future__ import annotations

import torch

from halfbyte.quant.affine import fake_quantise
from halfbyte.quant.kernels import use_triton


def fake_quantise_rows(
    x: torch.Tensor, bits: int | torch.Tensor, *, a4_clip: float = 1.0, symmetric: bool = False
) -> torch.Tensor:
    """``x`` as its codes stand for it, one scale per token (last axis); the Triton twin gives the same bits.

    Args:
        x: ``[rows, ..., in]``, any dtype.
        bits: 4 or 8 for all, or int32 ``[rows]`` on ``x``'s device.
        a4_clip: share of a token's range that 4-bit codes span; 8-bit codes span all of it.
    """
    assert isinstance(bits, int) or bits.shape == x.shape[:1], "one width for each row"
    if use_triton(x):
        from halfbyte.quant.kernels.triton_kernels import fake_quantise_rows as fast

        return fast(x, bits, a4_clip, symmetric)
    if isinstance(bits, int):
        return fake_quantise(x, bits, symmetric=symmetric, clip=a4_clip if bits == 4 else 1.0)
    bits = bits.view(-1, *[1] * (x.dim() - 1))  # [rows, 1, ..., 1]
    return fake_quantise(x, bits, symmetric=symmetric, clip=torch.where(bits == 4, a4_clip, 1.0))
