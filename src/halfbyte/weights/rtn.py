"""Round to nearest on absmax scales."""

from __future__ import annotations

import torch

from halfbyte.formats.int_group import GroupedWeight, absmax_scales, encode_with_scales


def round_to_nearest(
    weight: torch.Tensor, group_size: int, bits: int = 4, *, where: object = "weight"
) -> GroupedWeight:
    """Encode ``weight`` ``[out, in]`` in symmetric groups of ``group_size``, which must divide ``in``.

    Raises:
        HalfbyteError: NaN or Inf in ``weight``, named by ``where``.
    """
    return encode_with_scales(weight, absmax_scales(weight, group_size, bits, where=where), bits)
