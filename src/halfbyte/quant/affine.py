"""Activation quantisation: one scale per token, chosen at run time.

Asymmetric: the range is the token's min and max, widened to hold zero, and zero is exactly representable
(Jacob et al. 2018, arXiv:1712.05877). Symmetric: the rule of compressed-tensors, ``s = absmax / ((2^b - 1) / 2)``,
codes in [-2^(b-1), 2^(b-1) - 1], so that engines which read that format compute the same numbers.

``bits`` and ``clip`` are numbers, or tensors that differ from row to row (``[..., 1]``, integers and fp32): candidates
that differ only in bits share one pass.
"""

from __future__ import annotations

import torch

from halfbyte.quant.kernels import use_triton


def divided(x: torch.Tensor, divisor: float | torch.Tensor) -> torch.Tensor:
    """``x / divisor``, rounded once on every device: with a Python number CUDA multiplies by the rounded reciprocal."""
    return x / (divisor if isinstance(divisor, torch.Tensor) else torch.full_like(x, divisor))


def quantise_asymmetric(
    x: torch.Tensor, bits: int | torch.Tensor, *, clip: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero point of every row (last axis) of ``x`` ``[..., channels]``.

    Args:
        clip: share of the range that the codes span; what lies outside is cut off.

    Returns:
        codes fp32 integers in [0, 2^bits - 1], scale ``[..., 1]``, zero point ``[..., 1]``; a zero row gets scale 1.
    """
    top = 2**bits - 1
    x = x.float()
    low = x.amin(dim=-1, keepdim=True).clamp_max_(0.0)
    high = x.amax(dim=-1, keepdim=True).clamp_min_(0.0)
    scale = divided((high - low) * clip, top)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-low * clip / scale)
    codes = torch.round(x / scale).add_(zero).clamp_(0 * top, top)  # clamp takes two numbers or two tensors
    return codes, scale, zero


def quantise_symmetric(
    x: torch.Tensor, bits: int | torch.Tensor, *, clip: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in [-2^(bits-1), 2^(bits-1) - 1] as fp32 integers, and scale ``[..., 1]``, of every row of ``x``."""
    half = 2 ** (bits - 1)
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = divided(largest * clip, (2**bits - 1) / 2)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(x / scale).clamp_(-half, half - 1), scale


def fake_quantise(
    x: torch.Tensor, bits: int | torch.Tensor, *, symmetric: bool = False, clip: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """``x`` as its ``bits``-bit codes stand for it, row by row, in ``x``'s dtype."""
    if symmetric:
        codes, scale = quantise_symmetric(x, bits, clip=clip)
        return codes.mul_(scale).to(x.dtype)
    codes, scale, zero = quantise_asymmetric(x, bits, clip=clip)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


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
