"""What the weights of an encoded ggml row can be if its scales stay and only the codes change.

A weight is ``step * code + offset``, or ``step * table[code]`` in the types with 16 uneven values. A type says in which
bits of a block its codes are and how its scales become steps and minima; shapes and checks are here once.
Source of layouts and arithmetic: ggml's block definitions (ggml-common.h) and ``dequantize_row_*`` (ggml-quants.c).

In fp32 the values are those of :func:`halfbyte.quant.ggml.types.decode`, bit for bit up to the sign of a zero: steps,
offsets and ``step * code`` are exact there, and so is the sum, except in the types with a minimum (Q2_K, Q4_K, Q5_K,
Q4_1, Q5_1), where ggml rounds the same sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.ggml.types import check_rows

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl


@dataclass(frozen=True)
class Plane:
    """Where a block keeps some bits of consecutive numbers: in runs of bytes, each run read once per bit position.

    Byte k of a run holds number k in its lowest ``width`` bits, number ``run`` + k in the next, and so on.

    Attributes:
        start: first byte in the block.
        n_bytes: how many bytes, a multiple of ``run``.
        width: bits per number: 1, 2, 4 or 8.
        run: bytes per run.
    """

    start: int
    n_bytes: int
    width: int
    run: int

    def read(self, blocks: Tensor) -> Tensor:
        """The numbers of each block: uint8 ``[n, block bytes]`` to uint8 ``[n, n_bytes * 8 / width]``."""
        held = blocks[:, self.start : self.start + self.n_bytes].reshape(
            len(blocks), self.n_bytes // self.run, 1, self.run
        )
        numbers = (held >> self._shifts(blocks)) & (2**self.width - 1)  # [n, runs, positions, run]
        return numbers.reshape(len(blocks), self.n_bytes * 8 // self.width)

    def write_(self, blocks: Tensor, numbers: Tensor) -> None:
        """Undo :meth:`read`: put the lowest ``width`` bits of ``numbers`` into ``blocks``, which is changed."""
        shifts = self._shifts(blocks)
        shape = len(blocks), self.n_bytes // self.run, len(shifts), self.run
        parts = (numbers & (2**self.width - 1)).reshape(shape) << shifts
        held = parts.sum(2, dtype=torch.uint8)  # [n, runs, run]; no two parts share a bit
        blocks[:, self.start : self.start + self.n_bytes] = held.reshape(len(blocks), self.n_bytes)

    def _shifts(self, blocks: Tensor) -> Tensor:
        return torch.arange(0, 8, self.width, dtype=torch.uint8, device=blocks.device)[:, None]  # [positions, 1]


Scales = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Grid:
    """The codes of one ggml type.

    Attributes:
        name: of the type.
        planes: where a block keeps the bits of its codes, from the lowest up.
        scales: blocks uint8 ``[n, block bytes]`` to step and, if the type has one, the value of code 0, each fp32
            ``[n, groups]``, in the order of the weights.
        centre: otherwise the code whose value is zero.
        flipped: bits of a code that the block holds inverted.
        table: what ``step`` multiplies, for each code; None if it is the code itself.
    """

    name: str
    planes: tuple[Plane, ...]
    scales: Scales
    centre: int = 0
    flipped: int = 0
    table: tuple[int, ...] | None = None

    @property
    def bits(self) -> int:
        """Width of a code: it is 0 up to 2^bits - 1."""
        return sum(plane.width for plane in self.planes)

    @property
    def sizes(self) -> tuple[int, int]:
        """Weights and bytes of a block."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]]

    def blocks_of(self, rows: Tensor) -> Tensor:
        """uint8 ``[rows, row bytes]`` to ``[n, block bytes]``, or an error."""
        check_rows(rows, self.name, self.sizes[1])
        return rows.reshape(-1, self.sizes[1])

    def in_features(self, rows: Tensor) -> int:
        """Weights in a row of uint8 ``[rows, row bytes]``."""
        return rows.shape[1] // self.sizes[1] * self.sizes[0]


def has_grid(type_name: str) -> bool:
    """Whether the other functions here know the type; those with a codebook of several weights have no grid."""
    return type_name in GRIDS


def grid_of(blocks: Tensor, type_name: str) -> tuple[Tensor, Tensor]:
    """Step and offset of every weight of encoded rows: uint8 ``[rows, row bytes]`` to two fp32 ``[rows, in]``.

    A weight is ``step * code + offset``, or ``step * table[code]`` with an offset of zero where the type has a table.
    A step may be negative or zero, and then all codes give the same value.

    Raises:
        HalfbyteError: the type has no grid, or ``blocks`` are not rows of it.
    """
    grid = _grid(type_name)
    step, minimum = grid.scales(grid.blocks_of(blocks))  # [n, groups]
    offset = step * -grid.centre if minimum is None else minimum
    shape = len(blocks), grid.in_features(blocks)
    group_size = grid.sizes[0] // step.shape[1]
    return step.repeat_interleave(group_size, 1).view(shape), offset.repeat_interleave(group_size, 1).view(shape)


def codes_of(blocks: Tensor, type_name: str) -> Tensor:
    """The codes of encoded rows: uint8 ``[rows, row bytes]`` to uint8 ``[rows, in]``, each 0 up to 2^bits - 1.

    Raises:
        HalfbyteError: the type has no grid, or ``blocks`` are not rows of it.
    """
    grid = _grid(type_name)
    return _read(grid, grid.blocks_of(blocks)).view(len(blocks), grid.in_features(blocks))


def values_of(blocks: Tensor, type_name: str) -> Tensor:
    """What encoded rows stand for: uint8 ``[rows, row bytes]`` to fp32 ``[rows, in]``, as ggml computes it.

    Nothing is read from or written to the host, so that a GPU need not be waited for.

    Raises:
        HalfbyteError: the type has no grid, or ``blocks`` are not rows of it.
    """
    grid = _grid(type_name)
    flat = grid.blocks_of(blocks)
    step, minimum = grid.scales(flat)  # [n, groups]
    codes = _read(grid, flat).view(*step.shape, -1)  # [n, groups, weights of a group]
    if grid.table:
        numbers = _table(grid.table, blocks.device)[codes.int()]
    else:
        numbers = (codes - grid.centre).view(torch.int8) if grid.centre else codes  # bytes wrap around: 0 - 8 is -8
    values = step.unsqueeze(-1) * numbers
    if minimum is not None:
        values += minimum.unsqueeze(-1)
    return values.view(len(blocks), grid.in_features(blocks))


def with_codes(blocks: Tensor, type_name: str, codes: Tensor) -> Tensor:
    """The rows with the scales of ``blocks`` and other codes: a new uint8 ``[rows, row bytes]``.

    Args:
        blocks: uint8 ``[rows, row bytes]``.
        type_name: a type of ``GRIDS``.
        codes: uint8 ``[rows, in]``, on the device of ``blocks``, each 0 up to 2^bits - 1.

    Raises:
        HalfbyteError: the type has no grid, ``blocks`` are not rows of it, or ``codes`` have another shape or dtype or
            are too large.
    """
    grid = _grid(type_name)
    changed = grid.blocks_of(blocks).clone()  # [n, block bytes]
    shape = [len(blocks), grid.in_features(blocks)]
    if codes.dtype != torch.uint8 or list(codes.shape) != shape:
        raise HalfbyteError(
            f"{type_name}: codes do not fit the rows, expected torch.uint8 {shape}, "
            f"got {codes.dtype} {list(codes.shape)}"
        )
    if grid.bits < 8 and codes.numel() and int(codes.max()) >> grid.bits:
        raise HalfbyteError(
            f"{type_name}: codes are too large, expected up to {2**grid.bits - 1}, got {int(codes.max())}"
        )
    rest = codes.reshape(len(changed), grid.sizes[0]) ^ grid.flipped
    for plane in grid.planes:
        plane.write_(changed, rest)
        rest = rest >> plane.width
    return changed.view_as(blocks)


def _read(grid: Grid, flat: Tensor) -> Tensor:
    """uint8 ``[n, block bytes]`` to the codes, uint8 ``[n, block]``."""
    codes, low_bits = grid.planes[0].read(flat), grid.planes[0].width
    for plane in grid.planes[1:]:
        codes |= plane.read(flat) << low_bits
        low_bits += plane.width
    return codes ^ grid.flipped if grid.flipped else codes


@cache
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """fp32, sent to the device once."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _grid(type_name: str) -> Grid:
    if type_name not in GRIDS:
        raise HalfbyteError(f"{type_name}: type has no grid of codes, expected {' or '.join(GRIDS)}, got {type_name!r}")
    return GRIDS[type_name]


def _fp16(blocks: Tensor, start: int) -> Tensor:
    """The fp16 at byte ``start`` of each block: fp32 ``[n, 1]``."""
    return blocks[:, start : start + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _symmetric(blocks: Tensor) -> tuple[Tensor, None]:
    """Blocks that start with their fp16 step."""
    return _fp16(blocks, 0), None


def _with_minimum(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_1, Q5_1: fp16 step, then the fp16 value of code 0."""
    return _fp16(blocks, 0), _fp16(blocks, 2)


def _q2_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Per 16 weights a byte: 4 bits of scale below 4 bits of minimum."""
    scale, minimum = Plane(0, 16, 8, 16).read(blocks) & 15, Plane(0, 16, 8, 16).read(blocks) >> 4
    return _fp16(blocks, 80) * scale, -(_fp16(blocks, 82) * minimum)


def _q3_k(blocks: Tensor) -> tuple[Tensor, None]:
    """Per 16 weights 6 bits, 32 is zero: 4 low bits in 8 bytes, then 2 high bits in 4 bytes."""
    scale = Plane(96, 8, 4, 8).read(blocks) | Plane(104, 4, 2, 4).read(blocks) << 4
    return _fp16(blocks, 108) * (scale.float() - 32), None


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K, Q5_K: per 32 weights 6 bits of scale and 6 of minimum.

    Bytes 4 to 7 are scales 0 to 3 and bytes 8 to 11 minima 0 to 3, each below the 2 high bits of its number 4 to 7;
    bytes 12 to 15 hold the 4 low bits of scales 4 to 7, above them those of minima 4 to 7.
    """
    first, second, low = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scale = torch.cat([first & 63, low & 15 | first >> 6 << 4], 1)  # [n, 8]
    minimum = torch.cat([second & 63, low >> 4 | second >> 6 << 4], 1)
    return _fp16(blocks, 0) * scale, -(_fp16(blocks, 2) * minimum)


def _q6_k(blocks: Tensor) -> tuple[Tensor, None]:
    """Per 16 weights an int8."""
    return _fp16(blocks, 208) * blocks[:, 192:208].view(torch.int8), None


def _iq4_xs(blocks: Tensor) -> tuple[Tensor, None]:
    """Per 32 weights 6 bits, 32 is zero: 2 high bits in 2 bytes, then 4 low bits in 4 bytes."""
    scale = Plane(4, 4, 4, 1).read(blocks) | Plane(2, 2, 2, 1).read(blocks) << 4
    return _fp16(blocks, 0) * (scale.float() - 32), None


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("Q2_K", (Plane(16, 64, 2, 32),), _q2_k),
        Grid("Q3_K", (Plane(32, 64, 2, 32), Plane(0, 32, 1, 32)), _q3_k, centre=4),
        Grid("IQ4_XS", (Plane(8, 128, 4, 16),), _iq4_xs, table=IQ4_VALUES),
        Grid("IQ4_NL", (Plane(2, 16, 4, 16),), _symmetric, table=IQ4_VALUES),
        Grid("Q4_0", (Plane(2, 16, 4, 16),), _symmetric, centre=8),
        Grid("Q4_K", (Plane(16, 128, 4, 32),), _q4_k),
        Grid("Q4_1", (Plane(4, 16, 4, 16),), _with_minimum),
        Grid("Q5_0", (Plane(6, 16, 4, 16), Plane(2, 4, 1, 1)), _symmetric, centre=16),
        Grid("Q5_K", (Plane(48, 128, 4, 32), Plane(16, 32, 1, 32)), _q4_k),
        Grid("Q5_1", (Plane(8, 16, 4, 16), Plane(4, 4, 1, 1)), _with_minimum),
        Grid("Q6_K", (Plane(0, 128, 4, 64), Plane(128, 64, 2, 32)), _q6_k, centre=32),
        Grid("Q8_0", (Plane(2, 32, 8, 32),), _symmetric, centre=128, flipped=0x80),  # a code is the block's int8 + 128
    )
}  # ascending by bits per weight
