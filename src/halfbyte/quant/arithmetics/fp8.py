"""fp8 (e4m3) activations, one scale per token: ``s = absmax / 448``, values rounded to e4m3, half to even.

What compressed-tensors, and so transformers, computes for an fp8 input; weights are code times scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from halfbyte.quant.affine import divided
from halfbyte.quant.arithmetics import NOT_ROUNDED, Arithmetic

if TYPE_CHECKING:
    from halfbyte.quant.quant_linear import InputScheme

E4M3_MAX = 448.0
LEAST_SCALE = 1 / (E4M3_MAX * 512)  # vLLM's, of a token and of a row of scales


class Fp8(Arithmetic):
    """A8 as fp8, and A16."""

    a_bits = (8, NOT_ROUNDED)

    def rounded_to(self, x: torch.Tensor, bits: int, scheme: InputScheme) -> torch.Tensor:
        rows = x.float()
        scale = divided(rows.abs().amax(dim=-1, keepdim=True), E4M3_MAX).clamp_min_(LEAST_SCALE)
        return e4m3(rows / scale).mul_(scale).to(x.dtype)


ARITHMETIC = Fp8()


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp32 values rounded to e4m3, half to even; what is too large becomes the largest."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
