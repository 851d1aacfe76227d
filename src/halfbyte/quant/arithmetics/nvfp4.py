"""NVFP4 inputs, as vLLM rounds them on Blackwell: e2m1 numbers, 16 channels to an e4m3 scale; and A16.

With the layer's global scale ``G`` a group's scale is ``s = e4m3(G · (absmax · 1/6))``, its codes are
``e2m1(x · 1/(s/G))``, and they stand for ``code · s/G``. Source: vLLM 0.33, ``utils/nvfp4_emulation_utils.py``, which
does what its kernels do but for their approximate reciprocals: there a value just between two codes may fall on the
other side. A group with ``s = 0`` is 0. Weights are code times scale.

``G`` is part of the folder. llm-compressor takes ``448 · 6 / absmax`` of calibration text (``generate_gparam`` of
compressed-tensors); ours is the largest power of two that is not above. Quotients with it are exact, so engines that
divide in another order round alike, and values up to twice those seen are not cut off. It costs nothing: a group's
scale only loses bits below 2⁻⁶, and 448 is 28,672 times that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from halfbyte.quant.arithmetics import NOT_ROUNDED, Arithmetic
from halfbyte.quant.arithmetics.fp8 import E4M3_MAX, e4m3
from halfbyte.quant.grids import E2M1, E2M1_MAX, Grid, e2m1
from halfbyte.quant.int4 import ScaleRule

if TYPE_CHECKING:
    from halfbyte.quant.quant_linear import InputScheme

GROUP = 16
LARGEST_EXPONENT = 40  # of G, where inputs are almost or all zero


class Nvfp4(Arithmetic):
    """See the module; ``scheme.scale`` is G, or 0 to take that of the values at hand."""

    a_bits = (4, NOT_ROUNDED)

    def calibrated(self, scheme: InputScheme, seen: Iterable[torch.Tensor]) -> InputScheme:
        return replace(scheme, scale=global_scale(scheme.transform(batch) for batch in seen))

    def rounded_to(self, x: torch.Tensor, bits: int, scheme: InputScheme) -> torch.Tensor:
        grouped = x.float().unflatten(-1, (-1, GROUP))
        factor = scheme.scale or global_scale([x])
        largest = grouped.abs().amax(dim=-1, keepdim=True)
        return self._rounded(grouped, largest, factor).view_as(x).to(x.dtype)

    def _rounded(self, grouped: torch.Tensor, largest: torch.Tensor, factor: float) -> torch.Tensor:
        """Groups ``[..., groups, 16]`` with their largest sizes ``[..., groups, 1]``."""
        scale = e4m3(factor * (largest * (1 / E2M1_MAX))) / factor
        inverse = torch.where(scale == 0, scale, 1 / scale)
        return e2m1(grouped * inverse).mul_(scale)


ARITHMETIC = Nvfp4()


def global_scale(batches: Iterable[torch.Tensor]) -> float:
    """The largest power of two that takes no group's scale above 448.

    Args:
        batches: inputs, of any shape.
    """
    largest = max(float(batch.abs().max()) for batch in batches)
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** min(LARGEST_EXPONENT, math.floor(math.log2(E4M3_MAX * E2M1_MAX / largest)))


@dataclass(frozen=True)
class Nvfp4Scales(ScaleRule):
    """Group scales that the format holds: e4m3 numbers times one power of two for all layers of a unit.

    vLLM takes the largest global scale of layers that it fuses (q, k and v; gate and up) for all of them, so those
    share one. Another number would do as well, but with a power of two every scale is an fp16 number, as all are here.
    """

    signed: bool = False
    grid: Grid = E2M1
    by_row: bool = False

    def rounded(self, scales: torch.Tensor) -> torch.Tensor:
        """The nearest numbers of four significant bits, as e4m3 has where it is not subnormal."""
        mantissa, exponent = torch.frexp(scales.float())
        return torch.ldexp((mantissa * 16).round() / 16, exponent).to(torch.float16)

    def fitted(self, scales: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """``scales`` of one unit on its grid; see :meth:`halfbyte.quant.int4.ScaleRule.fitted`."""
        step = 2.0 ** scale_exponent(scales if known is None else known)
        return (e4m3(scales.float() / step) * step).to(scales.dtype)


LEAST_EXPONENT, MOST_EXPONENT = -15, 7  # fp16 holds every e4m3 number times two to these powers


def scale_exponent(scales: torch.Tensor) -> int:
    """The power of two by which fp16 ``scales`` of a unit are e4m3 numbers: 448 times it is not below any of them."""
    largest = float(scales.float().max())
    if not 0 < largest < math.inf:
        return LEAST_EXPONENT
    return min(MOST_EXPONENT, max(LEAST_EXPONENT, math.ceil(math.log2(largest / E4M3_MAX))))
