"""Humming's integer kernels (humming-kernels 0.1.19), which vLLM runs on Nvidia GPUs from Turing to Ada.

Inputs: in every group of channels, as large as the groups of weights, ``s = absmax / 7`` for A4 and ``absmax / 127``
for A8; values times ``1 / s`` are rounded half to even, codes from −8 and −128 on. Group scales of weights stay as they
are. The kernels also have one scale per token; then A4 loses more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from halfbyte.quant.affine import divided
from halfbyte.quant.arithmetics import Arithmetic

if TYPE_CHECKING:
    from halfbyte.quant.quant_linear import InputScheme

LEAST_SCALE = 1e-30  # of a group of zeros, as there


class Humming(Arithmetic):
    """See the module; ``scheme.group`` channels share a scale."""

    def rounded_to(self, x: torch.Tensor, bits: int, scheme: InputScheme) -> torch.Tensor:
        grouped = x.float().unflatten(-1, (-1, scheme.group))
        top = 2 ** (bits - 1) - 1
        scale = divided(grouped.abs().amax(dim=-1, keepdim=True), top).clamp_min_(LEAST_SCALE)
        codes = (grouped * scale.reciprocal()).round_().clamp_(-top - 1, top)
        return codes.mul_(scale).view_as(x).to(x.dtype)


ARITHMETIC = Humming()
