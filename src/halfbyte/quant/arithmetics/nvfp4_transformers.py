"""NVFP4 inputs as compressed-tensors, and so transformers, rounds them: :mod:`halfbyte.quant.arithmetics.nvfp4`, but
divided where vLLM multiplies with reciprocals: ``s = e4m3(G · (absmax / 6))``, codes ``e2m1(x / (s / G))``.

Source: compressed-tensors 0.20, ``calculate_qparams`` and ``_quantize_dequantize``. A scale that would be 0 becomes 1/8
there, with which all codes of the group are 0 too. Of bf16 inputs 2 in 10,000 differ from vLLM's: ties between codes.
"""

from __future__ import annotations

import torch

from halfbyte.quant.arithmetics.fp8 import e4m3
from halfbyte.quant.arithmetics.nvfp4 import Nvfp4
from halfbyte.quant.grids import E2M1_MAX, e2m1


class Nvfp4Transformers(Nvfp4):
    """See the module."""

    def _rounded(self, grouped: torch.Tensor, largest: torch.Tensor, factor: float) -> torch.Tensor:
        scale = e4m3(factor * (largest / E2M1_MAX)) / factor
        safe = torch.where(scale == 0, torch.full_like(scale, torch.inf), scale)
        return e2m1(grouped / safe).mul_(scale)


ARITHMETIC = Nvfp4Transformers()
