"""What a weight quantiser has to say about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.core.registry import Registry

if TYPE_CHECKING:  # the names of the quantisers are asked for without torch
    from halfbyte.quant.int4 import GroupedWeight, ScaleRule
    from halfbyte.quant.moments import InputMoments

    Encode = Callable[[InputMoments, int, object, ScaleRule], tuple[GroupedWeight, str]]


@dataclass(frozen=True)
class WeightQuantiser:
    """A way to choose codes.

    Attributes:
        encode: (moments with the weight, group size, name for errors, what scales may be) -> codes of that weight, and
            a note, empty unless something went otherwise than asked.
        looks_at_inputs: moments must have seen calibration tokens; otherwise only ``moments.weight`` is used.
        rounding_share: squared output error of its codes over that of plain rounding, to weigh weights against
            activations when channel scales are chosen.
        scales_for_weights: channel scales are chosen for the weights' error alone, from powers of the activations.
    """

    encode: Encode
    looks_at_inputs: bool
    rounding_share: float
    scales_for_weights: bool = False


QUANTISERS: Registry[WeightQuantiser] = Registry("weight quantiser", "halfbyte.quant.quantisers", "QUANTISER")
