"""AWQ: channel scales and clipped group scales by output error, then plain rounding.

Lin et al. 2023 (arXiv:2306.00978). Its channel scales are powers of the activations' size alone; they are searched
where smoothing is, and folded like it.
"""

from __future__ import annotations

from halfbyte.quant.int4 import ANY_FP16, GroupedWeight, ScaleRule, encode_with_scales, searched_scales
from halfbyte.quant.quantisers import InputMoments, WeightQuantiser


def _encode(
    moments: InputMoments, group_size: int, where: object, rule: ScaleRule = ANY_FP16
) -> tuple[GroupedWeight, str]:
    scales = searched_scales(moments.weight, group_size, moments.hessian.diagonal(), rule=rule, where=where)
    return encode_with_scales(moments.weight, scales, grid=rule.grid), ""


QUANTISER = WeightQuantiser(_encode, looks_at_inputs=True, rounding_share=0.7, scales_for_weights=True)
