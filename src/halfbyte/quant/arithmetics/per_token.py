"""Integer codes with one scale per token: the simulation in PyTorch (:mod:`halfbyte.quant.affine`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from halfbyte.quant.affine import fake_quantise_rows
from halfbyte.quant.arithmetics import Arithmetic

if TYPE_CHECKING:
    from halfbyte.quant.quant_linear import InputScheme


class PerToken(Arithmetic):
    """Asymmetric, with a range of its own for A4; or symmetric, if the scheme says so."""

    def rounded(self, x: torch.Tensor, bits: int | torch.Tensor, scheme: InputScheme) -> torch.Tensor:
        return fake_quantise_rows(x, bits, a4_clip=scheme.a4_clip, symmetric=scheme.symmetric)

    def rounded_to(self, x: torch.Tensor, bits: int, scheme: InputScheme) -> torch.Tensor:
        return self.rounded(x, bits, scheme)


ARITHMETIC = PerToken()
