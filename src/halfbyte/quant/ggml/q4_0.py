"""W4 codes as Q4_0 blocks, as they are: nothing is quantised again."""

from __future__ import annotations

import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.ggml.grid import GRIDS, with_codes
from halfbyte.quant.ggml.scales import Multiples, blocks_with
from halfbyte.quant.ggml.types import Array
from halfbyte.quant.int4 import GroupedWeight

BLOCK = GRIDS["Q4_0"].sizes[0]  # 32 elements share one scale


def check_q4_0(weight: GroupedWeight, *, where: object = "weight") -> None:
    """Refuse codes that Q4_0 cannot hold as they are.

    Raises:
        HalfbyteError: not 4 bits, groups that 32 does not divide, or scales that do not cover the row.
    """
    in_features, groups = weight.codes.shape[1], weight.scales.shape[1]
    if weight.bits != 4:
        raise HalfbyteError(f"{where}: Q4_0 holds 4-bit codes, expected bits 4, got {weight.bits}")
    if groups == 0 or in_features % groups or weight.group_size % BLOCK:
        raise HalfbyteError(
            f"{where}: weight groups do not divide into Q4_0 blocks, expected groups of a multiple of {BLOCK}, "
            f"got {groups} groups in a row of {in_features}",
            fix="use another group size, or leave this layer as F16",
        )


def q4_0_blocks(weight: GroupedWeight, *, where: object = "weight") -> Array:
    """The codes themselves as Q4_0, uint8 ``[out, in / 32 * 18]``.

    A block is the fp16 scale of its group, then 16 bytes: code j + 8 in the low and code j + 16 (+ 8) in the high
    nibble. A group of 128 becomes four blocks with the same scale.

    Raises:
        HalfbyteError: see :func:`check_q4_0`.
    """
    check_q4_0(weight, where=where)
    scales = weight.scales.cpu().float().repeat_interleave(weight.group_size // BLOCK, 1).view(-1, 1)  # [blocks, 1]
    blocks = blocks_with("Q4_0", Multiples(scales, torch.ones_like(scales)), None)
    codes = (weight.codes.cpu() + GRIDS["Q4_0"].centre).view(torch.uint8)
    return with_codes(blocks.view(len(codes), -1), "Q4_0", codes).numpy()
