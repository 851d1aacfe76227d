"""CUTLASS W4A8 as vLLM runs it on Hopper: int4 weights, fp8 inputs; and A16, where inputs are not rounded.

Inputs are those of :mod:`halfbyte.quant.arithmetics.fp8`. Weights (vLLM's ``convert_bf16_scales_to_fp8`` and
``cutlass_pack_scale_fp8``): with ``c`` a row's largest group scale / 448, a group scale becomes
``v = e4m3(e4m3(s / c) / 8)``, and a weight is looked up among e4m3 numbers: ``8 c · e4m3(code · v)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.quant.affine import divided
from halfbyte.quant.arithmetics.fp8 import E4M3_MAX, LEAST_SCALE, Fp8, e4m3
from halfbyte.quant.int4 import GroupedWeight, ScaleRule

SHRINK = 8.0  # what scales are divided by, so that eight times one is still an e4m3 number


class Cutlass(Fp8):
    """See the module."""

    own_weights = frozenset({8})

    def decoded(self, weight: GroupedWeight, bits: int) -> torch.Tensor:
        if bits != 8:
            return weight.decode()
        scales = weight.scales.float()
        row = row_scale(scales)
        small = e4m3(e4m3(scales / row) / SHRINK)  # [out, groups]
        codes = weight.codes.view(*scales.shape, -1).float()
        products = e4m3(codes * small.unsqueeze(-1))
        return (products * (SHRINK * row).unsqueeze(-1)).view(weight.shape)


ARITHMETIC = Cutlass()


def row_scale(scales: torch.Tensor) -> torch.Tensor:
    """What the kernel divides a row's group scales by, fp32 ``[out, 1]``."""
    return divided(scales.abs().amax(dim=-1, keepdim=True), E4M3_MAX).clamp_min(LEAST_SCALE)


@dataclass(frozen=True)
class Fp8Scales(ScaleRule):
    """Group scales that the kernel takes over without loss: e4m3 numbers times a factor of the row.

    The factor has four significant bits and the row's largest scale is ± 448 times it, so that every product is a bf16
    number and the kernel finds the same factor. In a row whose scales are all below 448 ``LEAST_SCALE`` (weights below
    0.014) the kernel's factor is no such number; what is stored there is the nearest bf16 number, at most 0.2 % away.
    """

    bf16: bool = True

    def fitted(self, scales: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """``scales`` ``[out, groups]`` on its grid; see :meth:`halfbyte.quant.int4.ScaleRule.fitted`."""
        first = (scales if known is None else known).float()
        at = first.abs().argmax(dim=-1, keepdim=True)
        largest = first.gather(-1, at)
        factor = _four_bits(largest.abs() / E4M3_MAX)
        small = factor < LEAST_SCALE
        factor = torch.where(small, torch.full_like(factor, LEAST_SCALE), factor)
        fitted = e4m3(scales.float() / factor) * factor
        fitted = torch.where(small, fitted, fitted.scatter(-1, at, E4M3_MAX * factor * largest.sign()))
        return self.rounded(fitted).to(scales.dtype)


def _four_bits(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of four significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 16).round() / 16, exponent)
