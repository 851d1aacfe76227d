"""What a 4-bit code of a weight may stand for: evenly spaced integers, or the values of a 4-bit float.

Every grid is one of integers, so that a weight is code times scale whatever the grid. Those of e2m1 (one sign bit, two
of exponent, one of mantissa; OCP Microscaling Formats 1.0) are its values doubled: 0, 1, 2, 3, 4, 6, 8, 12 and their
negatives. What the format calls a scale is then twice ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

E2M1_MAX = 6.0


@dataclass(frozen=True)
class Grid:
    """The codes of a format.

    Attributes:
        name: of the format.
        values: the codes, in the order of the nibbles 0 to 15 that they are stored as.
        ratios: what scales are tried, as shares of the one that takes a group's largest weight to :attr:`top`.
    """

    name: str
    values: tuple[int, ...]
    ratios: tuple[float, ...]

    @property
    def top(self) -> int:
        """The largest code."""
        return max(self.values)

    @property
    def even(self) -> bool:
        """Whether codes are consecutive integers."""
        return self.top - min(self.values) == len(self.values) - 1

    def nearest_(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest codes, fp32 as ``x``, which may be overwritten; half to even, and at most the largest."""
        return x.round_().clamp_(min(self.values), self.top) if self.even else e2m1(x / 2).mul_(2)

    def choices(self, device: torch.device) -> int | torch.Tensor:
        """The codes as the column loops of GPTQ take them (:data:`halfbyte.quant.kernels.Codes`)."""
        if self.even:
            return 4
        return torch.tensor(sorted(set(self.values)), dtype=torch.float32, device=device)

    def to_nibbles(self, codes: torch.Tensor) -> torch.Tensor:
        """int8 codes as the nibbles that they are stored as, in two's complement: int8 from -8 to 7."""
        if self.even:
            return codes
        known = torch.zeros(256, dtype=torch.int8, device=codes.device)
        for nibble, value in reversed(list(enumerate(self.values))):  # of two zeros the positive one
            known[value % 256] = nibble if nibble < 8 else nibble - 16
        return known[codes.to(torch.uint8).int()]

    def from_nibbles(self, nibbles: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_nibbles`."""
        if self.even:
            return nibbles
        return torch.tensor(self.values, dtype=torch.int8, device=nibbles.device)[(nibbles & 0xF).int()]


INT4 = Grid("int4", (*range(8), *range(-8, 0)), (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65))
_SIZES = (0, 1, 2, 3, 4, 6, 8, 12)
# Above 1 too: with the largest weight at 8 the codes around it are nearer to each other than around 12.
E2M1 = Grid(
    "e2m1",
    (*_SIZES, *(-size for size in _SIZES)),
    (1.0, 1.6, 1.5, 1.41, 1.33, 1.25, 1.18, 1.11, 1.05, 0.95, 0.89, 0.84, 0.79, 0.74, 0.7, 0.66),
)
GRIDS = {grid.name: grid for grid in (INT4, E2M1)}


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """fp32 values rounded to e2m1 numbers, half to even; what is too large becomes 6."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))  # between neighbours
    return (x / step).round_().mul_(step)
