"""What an engine computes a quantised layer as: how it rounds inputs, and what it makes of weight codes.

One file each, found by its name. The simulation, preparation and the check of an export all ask here, so that a plan is
measured with the numbers that its engine computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import torch

from halfbyte.core.registry import Registry
from halfbyte.quant.int4 import GroupedWeight

if TYPE_CHECKING:
    from halfbyte.quant.quant_linear import InputScheme

NOT_ROUNDED = 16  # activation bits that leave inputs alone


class Arithmetic(ABC):
    """One engine's rule.

    Attributes:
        a_bits: activation bits that it knows, ascending; 16 is not rounded.
        own_weights: those of them for which weights are not simply code times scale (:meth:`decoded`).
    """

    a_bits: ClassVar[tuple[int, ...]] = (4, 8)
    own_weights: ClassVar[frozenset[int]] = frozenset()

    def calibrated(self, scheme: InputScheme, seen: Iterable[torch.Tensor]) -> InputScheme:
        """``scheme`` with what the rule keeps fixed at run time.

        Args:
            seen: batches of the layer's input on calibration text, before the scheme's transform, ``[tokens, in]``.
        """
        return scheme

    def rounded(self, x: torch.Tensor, bits: int | torch.Tensor, scheme: InputScheme) -> torch.Tensor:
        """``x`` ``[rows, ..., in]`` as its codes stand for it, in its dtype.

        Args:
            bits: one width for all, or int32 ``[rows]`` on ``x``'s device.
        """
        if isinstance(bits, int):
            return x if bits == NOT_ROUNDED else self.rounded_to(x, bits, scheme)
        chosen = bits.view(-1, *[1] * (x.dim() - 1))  # [rows, 1, ..., 1]
        result = x
        for width in self.a_bits:
            if width != NOT_ROUNDED:
                result = torch.where(chosen == width, self.rounded_to(x, width, scheme), result)
        return result

    @abstractmethod
    def rounded_to(self, x: torch.Tensor, bits: int, scheme: InputScheme) -> torch.Tensor:
        """The same with one width, not 16."""

    def decoded(self, weight: GroupedWeight, bits: int) -> torch.Tensor:
        """Weights fp32 ``[out, in]`` as they are multiplied with inputs of so many bits."""
        return weight.decode()


ARITHMETICS: Registry[Arithmetic] = Registry("arithmetic", "halfbyte.quant.arithmetics", "ARITHMETIC")
