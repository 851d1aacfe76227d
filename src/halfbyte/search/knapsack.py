"""Knapsacks, in arrays: which items fit best, and which choice of each unit.

All costs are integers, so that what fits has no rounding in it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from halfbyte.core.errors import HalfbyteError

ROUNDING = 1e-12  # relative to all gains: sums of the same gains in another order differ by less
SUMS_LIMIT = 2_000_000  # models stay far below: there are at most total cost / greatest common divisor, some thousands
EXCHANGES = 100  # improvements of a greedy solution at most; a few are the rule


def best_subset(costs: Sequence[int], gains: Sequence[float], room: int) -> list[int]:
    """Items with the largest sum of gains whose costs sum to ``room`` at most; items come by falling gain per cost.

    Dynamic programming over the sums that no cheaper sum beats: Nemhauser and Ullmann, "Discrete dynamic programming
    and capital allocation", Management Science 15, 1969. A sum is dropped when the items left, if the last one could be
    had in part (Dantzig's bound), do not lift it to the best sum that taking them in order has reached so far.

    Raises:
        HalfbyteError: more than ``SUMS_LIMIT`` sums would have to be kept.
    """
    cost_until = np.concatenate([[0], np.cumsum(np.array(costs, dtype=np.int64))])  # [items + 1]
    gain_until = np.concatenate([[0.0], np.cumsum(np.array(gains, dtype=float))])
    density = np.append(np.array(gains, dtype=float) / np.array(costs, dtype=float), 0.0)
    cost_sums, gain_sums = np.zeros(1, dtype=np.int64), np.zeros(1)  # [sums], both rising
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # per item: [sums] index of the sum before, [sums] item is in
    reached, rounding = 0.0, ROUNDING * float(gain_until[-1])
    for item, (cost, gain) in enumerate(zip(costs, gains, strict=True)):
        fits = np.flatnonzero(cost_sums + cost <= room)
        before = np.concatenate([np.arange(cost_sums.size), fits])
        taken = np.arange(before.size) >= cost_sums.size
        cost_sums, gain_sums = cost_sums[before] + cost * taken, gain_sums[before] + gain * taken
        order = np.lexsort((-gain_sums, cost_sums))
        cost_sums, gain_sums = cost_sums[order], gain_sums[order]
        beaten_by = np.maximum.accumulate(np.concatenate([[-np.inf], gain_sums[:-1]]))
        end = (
            np.searchsorted(cost_until, cost_until[item + 1] + room - cost_sums, side="right") - 1
        )  # all before it fit
        whole = gain_sums + gain_until[end] - gain_until[item + 1]
        part = (cost_until[item + 1] + room - cost_sums - cost_until[end]) * density[end]
        reached = max(reached, float(whole.max()))
        kept = np.flatnonzero((gain_sums > beaten_by) & (whole + part >= reached - rounding))
        if kept.size > SUMS_LIMIT:
            raise HalfbyteError("too many different sums of costs", where="knapsack", expected=f"{SUMS_LIMIT} at most")
        cost_sums, gain_sums = cost_sums[kept], gain_sums[kept]
        steps.append((before[order][kept], taken[order][kept]))
    chosen: list[int] = []
    place = gain_sums.size - 1
    for item in reversed(range(len(steps))):
        before, taken = steps[item]
        if taken[place]:
            chosen.append(item)
        place = int(before[place])
    return chosen


@dataclass(frozen=True, eq=False)
class MultipleChoice:
    """One choice of each unit, the least loss that fits: the multiple-choice knapsack.

    Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979. In all methods ``factors``
    (``[units]``, positive) multiply the losses of their units. A solution is full: no unit can be raised by one place.

    Attributes:
        costs: ``[units, places]`` integers, rising up to the unit's top and the same from there on.
        losses: ``[units, places]``, falling or level, the same from the top on.
        tops: ``[units]``, last place of each unit.
        capacity: the most that a solution may cost, no less than all units at place 0.
    """

    costs: np.ndarray
    losses: np.ndarray
    tops: np.ndarray
    capacity: int

    @cached_property
    def raise_costs(self) -> np.ndarray:
        """``[units, places]``: what the next place costs more; 0 from the top on."""
        return np.diff(self.costs, append=self.costs[:, -1:])

    @cached_property
    def wishes(self) -> np.ndarray:
        """``[units, places]``: loss that the next place saves, per cost; 0 from the top on."""
        return -np.diff(self.losses, append=self.losses[:, -1:]) / np.maximum(self.raise_costs, 1)

    @cached_property
    def _hull(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``[steps]`` each: unit, place reached, cost, and loss saved per cost along the units' lower convex hulls.

        Ordered by unit, then place; what a unit's steps save per cost never rises.
        """
        units: list[int] = []
        places: list[int] = []
        steps: list[int] = []
        slopes: list[float] = []
        for unit, top in enumerate(self.tops.tolist()):
            place, least = 0, math.inf
            while place < top:
                step = self.costs[unit, place + 1 : top + 1] - self.costs[unit, place]
                slope = (self.losses[unit, place] - self.losses[unit, place + 1 : top + 1]) / step
                best = int(np.flatnonzero(slope == slope.max())[-1])
                least = min(least, float(slope[best]))  # without rounding: the slope itself
                place += 1 + best
                units.append(unit)
                places.append(place)
                steps.append(int(step[best]))
                slopes.append(least)
        return (
            np.array(units, dtype=np.int64),
            np.array(places, dtype=np.int64),
            np.array(steps, dtype=np.int64),
            np.array(slopes),
        )

    def _room(self, levels: np.ndarray) -> int:
        return self.capacity - int(self.costs[np.arange(self.tops.size), levels].sum())

    def filled(self, levels: np.ndarray, wishes: np.ndarray) -> np.ndarray:
        """``levels`` ``[units]``, within the capacity, raised until nothing fits: the largest of ``wishes`` first.

        Among equals the smallest step comes first, then the first unit.
        """
        room, levels = self._room(levels), levels.copy()
        steps = self.raise_costs[np.arange(levels.size), levels]
        fits = np.flatnonzero((steps > 0) & (steps <= room)).tolist()  # what does not fit now never will
        heap = [(-float(wishes[unit, levels[unit]]), int(steps[unit]), unit) for unit in fits]
        heapq.heapify(heap)
        while heap:
            _, step, unit = heapq.heappop(heap)
            if step > room:
                continue
            room -= step
            levels[unit] += 1
            step = int(self.raise_costs[unit, levels[unit]])
            if 0 < step <= room:
                heapq.heappush(heap, (-float(wishes[unit, levels[unit]]), step, unit))
        return levels

    def _break(self, factors: np.ndarray) -> tuple[np.ndarray, int]:
        """Steps of the hulls in the order of loss saved per cost, and how many of them fit before one does not."""
        _, _, cost, slope = self._hull
        order = np.argsort(-slope * factors[self._hull[0]], kind="stable")
        room = self._room(np.zeros(self.tops.size, dtype=np.int64))
        return order, int(np.searchsorted(np.cumsum(cost[order]), room, side="right"))

    def greedy(self, factors: np.ndarray) -> np.ndarray:
        """``[units]`` places that lose nearly the least, in about a millisecond for hundreds of units.

        Steps along the hulls while they fit, then exchanges: one unit up, another down, by any places.
        """
        units, places, _, _ = self._hull
        order, fitting = self._break(factors)
        levels, wishes = np.zeros(self.tops.size, dtype=np.int64), factors[:, None] * self.wishes
        np.maximum.at(levels, units[order[:fitting]], places[order[:fitting]])
        levels = self.filled(levels, wishes)
        for _ in range(EXCHANGES):
            better = self._exchanged(levels, factors)
            if better is None:
                break
            levels = self.filled(better, wishes)
        return levels

    def _exchanged(self, levels: np.ndarray, factors: np.ndarray) -> np.ndarray | None:
        """``levels`` with the one unit raised and the one lowered that together save most; None if none do."""
        units, losses = np.arange(levels.size), factors[:, None] * self.losses
        spent = self.costs - self.costs[units, levels][:, None]  # [units, places], against now
        lost = losses - losses[units, levels][:, None]
        up_unit, up_place = np.nonzero(spent > 0)
        down_unit, down_place = np.nonzero(spent < 0)
        if up_unit.size == 0 or down_unit.size == 0:
            return None
        order = np.argsort(spent[down_unit, down_place], kind="stable")  # what saves most cost first
        down_unit, down_place = down_unit[order], down_place[order]
        down_lost = lost[down_unit, down_place]
        # Among the first n of the downs, which loses least?
        least = np.minimum.accumulate(down_lost)
        fresh = np.append(True, down_lost[1:] < least[:-1])
        which = np.maximum.accumulate(np.where(fresh, np.arange(down_lost.size), 0))
        limit = self._room(levels) - spent[up_unit, up_place]  # the most that the down may cost: below 0
        enough = np.searchsorted(spent[down_unit, down_place], limit, side="right")
        down = which[np.maximum(enough, 1) - 1]
        change = lost[up_unit, up_place] + down_lost[down]
        change[(enough == 0) | (down_unit[down] == up_unit)] = math.inf
        best = int(np.argmin(change))
        if not change[best] < -ROUNDING * losses[units, levels].sum():
            return None
        levels = levels.copy()
        levels[up_unit[best]], levels[down_unit[down[best]]] = up_place[best], down_place[down[best]]
        return levels

    def exact(self, factors: np.ndarray) -> np.ndarray:
        """``[units]`` places that lose least; only sums of losses are rounded, to float64.

        With the price of cost at which the hulls' steps stop to fit, each choice has a reduced loss, its loss and price
        above the least of its unit's. No better solution than the greedy one has choices whose reduced losses sum to
        more than the greedy one is above Lagrange's bound (Fisher, "The Lagrangian relaxation method for solving
        integer programming problems", Management Science 27, 1981). Few choices and few sums are left for the dynamic
        programming of :func:`best_subset`: milliseconds for hundreds of units.

        Raises:
            HalfbyteError: more than ``SUMS_LIMIT`` sums would have to be kept.
        """
        units = np.arange(self.tops.size)
        start, (order, fitting) = self.greedy(factors), self._break(factors)
        losses = factors[:, None] * (self.losses - self.losses[:, -1:])  # [units, places], above the least
        known = float(losses[units, start].sum())
        if known <= 0.0 or fitting == order.size:
            return start
        price = float(self._hull[3][order[fitting]] * factors[self._hull[0][order[fitting]]])
        priced = losses + price * (self.costs - self.costs[:, :1])
        base = priced.argmin(axis=1)  # of equals the first, which is never beyond the top
        room = self._room(base)  # may be below 0
        gap = known - float(losses[units, base].sum()) + price * room
        gap += ROUNDING * (known + price * self.capacity)
        reduced = priced - priced[units, base][:, None]
        open_ = (np.arange(losses.shape[1]) <= self.tops[:, None]) & (reduced <= gap)
        cost, loss = self.costs - self.costs[units, base][:, None], losses - losses[units, base][:, None]  # above base
        reach = np.where(open_, np.abs(cost), 0).max(axis=1)
        free = np.argsort(-reach, kind="stable")[: np.count_nonzero(reach)]  # units with a choice left, widest first
        least, most = (
            np.append(np.cumsum(ends[free][::-1])[::-1], 0)  # [free units + 1]: of those not decided yet
            for ends in (np.where(open_, cost, 0).min(axis=1), np.where(open_, cost, 0).max(axis=1))
        )
        cost_sums, loss_sums = np.zeros(1, dtype=np.int64), np.zeros(1)  # [sums]
        steps: list[tuple[np.ndarray, np.ndarray]] = []  # per free unit: [sums] index of the sum before, [sums] place
        for decided, unit in enumerate(free.tolist(), start=1):
            before, place = (
                grid.ravel() for grid in np.meshgrid(np.arange(cost_sums.size), np.flatnonzero(open_[unit]))
            )
            costs, lost = cost_sums[before] + cost[unit, place], loss_sums[before] + loss[unit, place]
            unused = np.maximum(room - costs - most[decided], 0)
            kept = np.flatnonzero((costs + least[decided] <= room) & (lost + price * (costs + unused) <= gap))
            kept = kept[np.lexsort((lost[kept], costs[kept]))]
            beaten_by = np.minimum.accumulate(np.append(np.inf, lost[kept]))[:-1]
            kept = kept[lost[kept] < beaten_by]
            if kept.size > SUMS_LIMIT:
                raise HalfbyteError(
                    "too many different sums of costs", where="knapsack", expected=f"{SUMS_LIMIT} at most"
                )
            cost_sums, loss_sums = costs[kept], lost[kept]
            steps.append((before[kept], place[kept]))
        if loss_sums.size == 0:  # nothing is better than what was known, by less than rounding
            return start
        levels, at = base.copy(), int(np.argmin(loss_sums))
        for unit, (before, place) in zip(reversed(free.tolist()), reversed(steps), strict=True):
            levels[unit], at = place[at], int(before[at])
        return self.filled(levels, factors[:, None] * self.wishes)
