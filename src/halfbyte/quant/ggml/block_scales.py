"""Scales of ggml blocks by weighted error, as tensor operations: llama.cpp's quantiser chooses them on the CPU.

For every group of weights x with costs u a step (and minimum) is wanted with the least Σ u (x − x̂)². Steps near the one
that just covers the group are tried; each gives codes, and codes give the best step in closed form. The same search
then finds the unit of which a super-block's steps are whole multiples, and of those multiples the ones beside are tried
too. Idea: ``make_qx_quants`` and ``make_qkx3_quants`` of ggml (ggml-quants.c); what is tried, and so the bytes, differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.quant.ggml.grid import GRIDS, Grid, with_codes
from halfbyte.quant.ggml.scales import ONE, SCALINGS, Multiples, Scaling, blocks_with
from halfbyte.quant.ggml.types import FP16_MAX, check_largest, row_bytes
from halfbyte.quant.kernels import use_triton

TOGETHER, ON_CPU = 1 << 23, 1 << 18  # weights whose scales are searched at once: 270 MB on a GPU; what caches hold
# Levels that a tried range has more than the type: it cuts peaks off. Types without minima need fewer tries, since they
# try steps of both signs.
BEYOND, BEYOND_SYMMETRIC = (torch.linspace(-0.9, 2.4, tries).tolist() for tries in (12, 8))
UNITS = torch.linspace(0.95, 1.35, 48).tolist()  # times the unit that just reaches the largest of a block's steps
AGAIN = 2  # how often codes and scales are fitted to each other after that
FLOOR = 2.0**-31  # of the largest importance


def choose_rows(weight: Tensor, type_name: str, importance: Tensor, *, where: object = "weight") -> Tensor:
    """Encode a matrix with scales of the least weighted error and the nearest codes, on its device.

    Args:
        weight: fp32 ``[out, in]``.
        type_name: a type of ``GRIDS``.
        importance: what a squared error costs in each input channel, ``[in]``.

    Returns:
        uint8 ``[out, row bytes]``.

    Raises:
        HalfbyteError: weights that are not finite or beyond fp16.
    """
    check_largest(float(weight.abs().amax()) if weight.numel() else 0.0, type_name, where)
    cost = importance.float().clamp_min(max(float(importance.max()), 1e-30) * FLOOR)
    cost = cost / cost.mean()
    step = max(1, (ON_CPU if weight.device.type == "cpu" else TOGETHER) // weight.shape[1])
    parts = [_rows(part, GRIDS[type_name], cost) for part in weight.split(step)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Numbers:
    """What a step can be multiplied with: whole numbers from ``low`` to ``high``, or some of them.

    Attributes:
        places: if some, the place among them of the one that is next to each number of the range, int32 ``[range]``.
        chosen: and which that is, fp32 ``[range]``.
        count: and how many they are.
    """

    low: int
    high: int
    places: Tensor | None = None
    chosen: Tensor | None = None
    count: int | None = None

    @staticmethod
    def of(grid: Grid, device: torch.device) -> Numbers:
        """Those of a type's codes."""
        if grid.table is None:
            return Numbers(-grid.centre, 2**grid.bits - 1 - grid.centre)
        low, high = grid.table[0], grid.table[-1]
        table = torch.tensor(grid.table, dtype=torch.float32, device=device)
        places = torch.bucketize(torch.arange(low, high + 1, device=device), (table[1:] + table[:-1]) / 2)
        return Numbers(low, high, places.int(), table[places], len(table))

    @property
    def levels(self) -> float:
        """Between zero and the far end of the range."""
        return self.high if self.low == 0 else (self.count or self.high - self.low + 1) / 2

    def nearest(self, x: Tensor, step: Tensor) -> Tensor:
        """What is nearest to ``x / step``, any where ``step`` is 0: ``[..., n]`` and ``[...]`` to fp32 ``[..., n]``."""
        whole = self._whole(x, step)
        return whole if self.chosen is None else self.chosen[whole.sub_(self.low).int()]

    def codes(self, x: Tensor, step: Tensor) -> Tensor:
        """Its place among all, uint8 ``[..., n]``."""
        from_low = self._whole(x, step).sub_(self.low)
        return (from_low if self.places is None else self.places[from_low.int()]).to(torch.uint8)

    def _whole(self, x: Tensor, step: Tensor) -> Tensor:
        safe = torch.where(step == 0, torch.ones_like(step), step)
        return (x / safe.unsqueeze(-1)).round_().clamp_(self.low, self.high)


def _rows(weight: Tensor, grid: Grid, cost: Tensor) -> Tensor:
    scaling, numbers = SCALINGS[grid.name], Numbers.of(grid, weight.device)
    shape = -1, scaling.groups, grid.sizes[0] // scaling.groups
    x = weight.reshape(shape)  # [blocks, groups, weights of a group]
    u = cost.expand_as(weight).reshape(shape)
    minima = None
    if scaling.minimum_at is None:
        step = symmetric_steps(x, u, numbers)
        steps = _best_multiples(x, u, numbers, _multiples(step, (u * x.square()).sum(-1), scaling), scaling)
    else:
        free, total = scaling.numbers == ONE, u.sum(-1)
        step, least = affine_steps(x, u, numbers.high, free=free)
        above = x - least.unsqueeze(-1)
        weight_of_step = (u * above.square()).sum(-1) / step.square().clamp_min(1e-30)
        steps = _best_multiples(above, u, numbers, _multiples(step, weight_of_step, scaling), scaling)
        multiple = steps.values.unsqueeze(-1) * numbers.nearest(above, steps.values)
        least = (u * (x - multiple)).sum(-1) / total  # the best one for the steps as they are now
        minima = _multiples(-least if free else -least.clamp_max(0), total, scaling)
        x = x + minima.values.unsqueeze(-1)
    blocks = blocks_with(grid.name, steps, minima).view(len(weight), row_bytes(weight.shape[1], grid.name))
    return with_codes(blocks, grid.name, numbers.codes(x, steps.values).view_as(weight))


def _multiples(wanted: Tensor, cost: Tensor, scaling: Scaling) -> Multiples:
    """``wanted`` ``[n, groups]``, errors of which cost ``cost``, as the type can hold it."""
    if scaling.numbers == ONE:
        return Multiples(_fp16(wanted), torch.ones_like(wanted))
    numbers = Numbers(*scaling.numbers)
    unit = _fp16(symmetric_steps(wanted, cost, numbers, UNITS))
    return Multiples(unit.unsqueeze(-1), numbers.nearest(wanted, unit))


def _best_multiples(x: Tensor, u: Tensor, numbers: Numbers, steps: Multiples, scaling: Scaling) -> Multiples:
    """The whole numbers near those of ``steps`` with the least weighted error."""
    if scaling.numbers == ONE:
        return steps
    best, error = steps.numbers, torch.full_like(steps.numbers, float("inf"))
    for more in (0, -1, 1):
        tried = (steps.numbers + more).clamp(*scaling.numbers)
        step = steps.unit * tried
        missed = (u * (x - step.unsqueeze(-1) * numbers.nearest(x, step)).square()).sum(-1)
        best, error = torch.where(missed < error, tried, best), torch.minimum(missed, error)
    return Multiples(steps.unit, best)


def _fp16(values: Tensor) -> Tensor:
    return values.clamp(-FP16_MAX, FP16_MAX).half().float()


def symmetric_steps(x: Tensor, u: Tensor, numbers: Numbers, factors: Sequence[float] = ()) -> Tensor:
    """Steps ``[...]`` of groups ``[..., n]``, with which ``step * number`` explains most of Σ u x².

    Args:
        factors: of the step that just covers the group, to try; by default those of ``BEYOND_SYMMETRIC``.
    """
    shares = factors or [numbers.levels / (numbers.levels + more) for more in BEYOND_SYMMETRIC]
    ends = [end for end in (numbers.low, numbers.high) if end]
    shares = torch.tensor([share / end for end in ends for share in shares], device=x.device)
    if use_triton(x):
        from halfbyte.quant.kernels.triton_scales import symmetric_steps as fast

        return fast(x, u, shares, numbers.low, numbers.high, numbers.chosen, AGAIN)
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best, explained = torch.zeros_like(extreme), torch.zeros_like(extreme)
    ux = u * x

    def consider(steps: Tensor) -> None:
        nonlocal best, explained
        q = numbers.nearest(x, steps)
        product, square = (ux * q).sum(-1), (u * q.square()).sum(-1)
        gain, at = torch.where(square > 0, product.square() / square, 0.0).max(0, keepdim=True)
        step = (product.gather(0, at) / square.gather(0, at)).squeeze(0)
        gain = gain.squeeze(0)
        better = gain > explained
        best, explained = torch.where(better, step, best), torch.where(better, gain, explained)

    for part in shares.split(_at_once(x)):
        consider(_times(part, extreme))
    for _ in range(AGAIN):
        consider(best.unsqueeze(0))
    return best


def _at_once(x: Tensor) -> int:
    """How many steps are tried at once for these groups: few operations on large tensors, which a device is best at."""
    return max(1, (ON_CPU if x.device.type == "cpu" else TOGETHER) // max(1, x.numel()))


def _times(factors: Tensor, values: Tensor) -> Tensor:
    """``[k]`` and ``[...]`` to ``[k, ...]``."""
    return factors.view(-1, *[1] * values.ndim) * values


def affine_steps(x: Tensor, u: Tensor, levels: int, *, free: bool) -> tuple[Tensor, Tensor]:
    """Steps and values of code 0, each ``[...]``, of groups ``[..., n]`` with the least weighted error.

    Args:
        levels: the largest code.
        free: the value of code 0 may be above zero.
    """
    shares = torch.tensor([1 / (levels + more) for more in BEYOND], device=x.device)
    if use_triton(x):
        from halfbyte.quant.kernels.triton_scales import affine_steps as fast

        return fast(x, u, shares, levels, free=free, again=AGAIN)
    low, high = x.amin(-1), x.amax(-1)
    if not free:
        low, high = low.clamp_max(0), high.clamp_min(0)
    best = (high - low) / levels
    least, error = low, torch.full_like(low, float("inf"))
    numbers = Numbers(0, levels)
    total, first = u.sum(-1), (u * x).sum(-1)

    def consider(steps: Tensor, start: Tensor) -> None:
        nonlocal best, least, error
        q = numbers.nearest(x - start.unsqueeze(-1), steps)
        uq = u * q
        mean, square, product = uq.sum(-1), (uq * q).sum(-1), (uq * x).sum(-1)
        spread = total * square - mean.square()
        slopes = torch.where(spread > 0, (total * product - mean * first) / spread, steps)
        offsets = (first - slopes * mean) / total
        if not free:
            slopes = torch.where(offsets > 0, product / square.clamp_min(1e-30), slopes)
            offsets = offsets.clamp_max(0)
        missed = (u * (q * slopes.unsqueeze(-1) + offsets.unsqueeze(-1) - x).square()).sum(-1)
        missed, at = missed.min(0, keepdim=True)
        slope, offset, missed = slopes.gather(0, at).squeeze(0), offsets.gather(0, at).squeeze(0), missed.squeeze(0)
        better = missed < error
        best, least = torch.where(better, slope, best), torch.where(better, offset, least)
        error = torch.where(better, missed, error)

    for part in shares.split(_at_once(x)):
        consider(_times(part, high - low), low)
    for _ in range(AGAIN):
        consider(best.unsqueeze(0), least)
    return best, least
