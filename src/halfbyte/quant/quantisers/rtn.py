"""Round to nearest on absmax scales."""

from __future__ import annotations

import torch

from halfbyte.quant.int4 import ANY_FP16, GroupedWeight, ScaleRule, absmax_scales, encode_with_scales
from halfbyte.quant.quantisers import InputMoments, WeightQuantiser


def round_to_nearest(
    weight: torch.Tensor, group_size: int, bits: int = 4, *, rule: ScaleRule = ANY_FP16, where: object = "weight"
) -> GroupedWeight:
    """Encode ``weight`` ``[out, in]`` in symmetric groups of ``group_size``, which must divide ``in``.

    Raises:
        HalfbyteError: NaN or Inf in ``weight``, named by ``where``.
    """
    scales = absmax_scales(weight, group_size, bits, rule=rule, where=where)
    return encode_with_scales(weight, scales, bits, rule.grid)


def _encode(
    moments: InputMoments, group_size: int, where: object, rule: ScaleRule = ANY_FP16
) -> tuple[GroupedWeight, str]:
    return round_to_nearest(moments.weight, group_size, rule=rule, where=where), ""


QUANTISER = WeightQuantiser(_encode, looks_at_inputs=False, rounding_share=1.0)
