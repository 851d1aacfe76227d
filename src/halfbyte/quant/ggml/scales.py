"""Blocks of ggml types from scales and codes of one's own: the other direction of :mod:`halfbyte.quant.ggml.grid`.

W4 codes become Q4_0 blocks as they are: nothing is quantised again.

Source of the layouts: ggml's block definitions (ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.ggml.grid import GRIDS, Plane, with_codes
from halfbyte.quant.ggml.types import Array
from halfbyte.quant.int4 import GroupedWeight

Q4_0_BLOCK = GRIDS["Q4_0"].sizes[0]  # 32 elements share one scale
ONE = (1, 1)  # a block has one step, and that is its unit
Write = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Scaling:
    """How a type keeps its steps: a group's step is ``unit * number``, its minimum ``-other unit * other number``.

    Attributes:
        groups: with a step of their own, per block.
        numbers: the least and the largest number.
        unit_at: byte of the fp16 unit of the steps.
        minimum_at: byte of the fp16 unit of the minima, or None if the type has none.
        write: puts numbers of steps and of minima, uint8 ``[n, groups]`` (two's complement or with their zero added, as
            the type has them), into blocks; None where they are all one.
        zero: what the type adds to a number.
    """

    groups: int
    numbers: tuple[int, int]
    unit_at: int
    minimum_at: int | None = None
    write: Write | None = None
    zero: int = 0


@dataclass(frozen=True)
class Multiples:
    """Scales of blocks: ``unit`` fp32 ``[n, 1]``, a value of fp16, times ``numbers`` ``[n, groups]``, whole in fp32."""

    unit: Tensor
    numbers: Tensor

    @property
    def values(self) -> Tensor:
        """fp32 ``[n, groups]``."""
        return self.unit * self.numbers


def blocks_with(type_name: str, steps: Multiples, minima: Multiples | None) -> Tensor:
    """Blocks with these scales and codes of zero bits: uint8 ``[n, block bytes]``.

    Args:
        minima: what a group's lowest value lies below zero, for the types that have minima.
    """
    known = SCALINGS[type_name]
    blocks = torch.zeros(len(steps.unit), GRIDS[type_name].sizes[1], dtype=torch.uint8, device=steps.unit.device)
    _write_fp16_(blocks, known.unit_at, steps.unit)
    numbers = (steps.numbers + known.zero).to(torch.int16).to(torch.uint8)
    if minima is None or known.minimum_at is None:
        others = numbers
    else:
        held = minima.unit if known.write else -minima.unit  # Q4_1 and Q5_1 hold the lowest value itself
        _write_fp16_(blocks, known.minimum_at, held)
        others = minima.numbers.to(torch.uint8)
    if known.write is not None:
        known.write(blocks, numbers, others)
    return blocks


def _write_fp16_(blocks: Tensor, start: int, values: Tensor) -> None:
    blocks[:, start : start + 2] = values.to(torch.float16).contiguous().view(torch.uint8)


def _write_q2_k(blocks: Tensor, scale: Tensor, minimum: Tensor) -> None:
    blocks[:, 0:16] = scale | minimum << 4


def _write_q3_k(blocks: Tensor, scale: Tensor, _: Tensor) -> None:
    Plane(96, 8, 4, 8).write_(blocks, scale)
    Plane(104, 4, 2, 4).write_(blocks, scale >> 4)


def _write_q4_k(blocks: Tensor, scale: Tensor, minimum: Tensor) -> None:
    blocks[:, 4:8] = scale[:, :4] | scale[:, 4:] >> 4 << 6
    blocks[:, 8:12] = minimum[:, :4] | minimum[:, 4:] >> 4 << 6
    blocks[:, 12:16] = scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4


def _write_q6_k(blocks: Tensor, scale: Tensor, _: Tensor) -> None:
    blocks[:, 192:208] = scale


def _write_iq4_xs(blocks: Tensor, scale: Tensor, _: Tensor) -> None:
    Plane(4, 4, 4, 1).write_(blocks, scale)
    Plane(2, 2, 2, 1).write_(blocks, scale >> 4)


SCALINGS = {
    "Q2_K": Scaling(16, (0, 15), 80, 82, _write_q2_k),
    "Q3_K": Scaling(16, (-32, 31), 108, write=_write_q3_k, zero=32),
    "IQ4_XS": Scaling(8, (-32, 31), 0, write=_write_iq4_xs, zero=32),
    "IQ4_NL": Scaling(1, ONE, 0),
    "Q4_0": Scaling(1, ONE, 0),
    "Q4_K": Scaling(8, (0, 63), 0, 2, _write_q4_k),
    "Q4_1": Scaling(1, ONE, 0, 2),
    "Q5_0": Scaling(1, ONE, 0),
    "Q5_K": Scaling(8, (0, 63), 0, 2, _write_q4_k),
    "Q5_1": Scaling(1, ONE, 0, 2),
    "Q6_K": Scaling(16, (-128, 127), 208, write=_write_q6_k),
    "Q8_0": Scaling(1, ONE, 0),
}  # every type of ``GRIDS``


def check_q4_0(weight: GroupedWeight, *, where: object = "weight") -> None:
    """Refuse codes that Q4_0 cannot hold as they are.

    Raises:
        HalfbyteError: not 4 bits, groups that 32 does not divide, or scales that do not cover the row.
    """
    in_features, groups = weight.codes.shape[1], weight.scales.shape[1]
    if weight.bits != 4:
        raise HalfbyteError(f"{where}: Q4_0 holds 4-bit codes, expected bits 4, got {weight.bits}")
    if groups == 0 or in_features % groups or weight.group_size % Q4_0_BLOCK:
        raise HalfbyteError(
            f"{where}: weight groups do not divide into Q4_0 blocks, expected groups of a multiple of {Q4_0_BLOCK}, "
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
    scales = weight.scales.cpu().float().repeat_interleave(weight.group_size // Q4_0_BLOCK, 1)
    scales = scales.view(-1, 1)  # [blocks, 1]
    blocks = blocks_with("Q4_0", Multiples(scales, torch.ones_like(scales)), None)
    codes = (weight.codes.cpu() + GRIDS["Q4_0"].centre).view(torch.uint8)
    return with_codes(blocks.view(len(codes), -1), "Q4_0", codes).numpy()
