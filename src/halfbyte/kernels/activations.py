"""Activation quantisation with one width per row of a batch: candidates that differ only in bits share one pass."""

from __future__ import annotations

import torch

from halfbyte.numerics.affine import fake_quantise


def fake_quantise_rows(
    x: torch.Tensor, bits: int | torch.Tensor, *, a4_clip: float = 1.0, symmetric: bool = False
) -> torch.Tensor:
    """``x`` as its codes stand for it, one scale per token (last axis).

    Args:
        x: ``[rows, ..., in]``, any dtype.
        bits: 4 or 8 for all, or int32 ``[rows]`` on ``x``'s device.
        a4_clip: share of a token's range that 4-bit codes span; 8-bit codes span all of it.
    """
    if isinstance(bits, int):
        return fake_quantise(x, bits, symmetric=symmetric, clip=a4_clip if bits == 4 else 1.0)
    parts = [
        fake_quantise(row, int(width), symmetric=symmetric, clip=a4_clip if int(width) == 4 else 1.0)
        for row, width in zip(x, bits, strict=True)
    ]
    return torch.stack(parts)
