"""The search problem in numbers: one choice of activation bits per unit, a budget, and how to keep to it.

Costs are integers, so a genome's cost is exact and "fits" has no rounding in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import rankdata

from halfbyte.errors import HalfbyteError

Genome = tuple[int, ...]

BUDGET_EPSILON = 1e-12  # relative: 0.7 is not a binary fraction, and a genome that meets it exactly must fit
LEAST_WEIGHT = 0.1  # sampling weight of the last unit in rank; the first has 1 + LEAST_WEIGHT
SPACE_VISITS = 50_000  # nodes that Problem.space looks at before it gives up


@dataclass(frozen=True)
class Problem:
    """Which genomes are legal, and which legal genome is near one that is not.

    Attributes:
        costs: multiply-accumulates per token of each unit.
        budget: largest allowed mean of bits / 8, weighted by costs; from ``choices[0] / 8`` to ``choices[-1] / 8``.
        choices: activation bits to choose from, ascending.
        priority: how much each unit wants more bits (its sensitivity, in any unit of measurement); only the order of
            ``priority / cost`` is used, by repair, fill and mutation. None: no unit is preferred.

    Raises:
        HalfbyteError: no units, a cost below one, choices out of order, the budget out of range, or a priority that is
            not finite or not one per unit.
    """

    costs: tuple[int, ...]
    budget: float
    choices: tuple[int, ...] = (4, 8)
    priority: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # Plain numbers, also from NumPy: integers of any size, and values that JSON can hold.
        object.__setattr__(self, "costs", tuple(int(cost) for cost in self.costs))
        object.__setattr__(self, "choices", tuple(int(bits) for bits in self.choices))
        if self.priority is not None:
            object.__setattr__(self, "priority", tuple(float(value) for value in self.priority))
        if not self.costs or min(self.costs) < 1:
            raise HalfbyteError("costs must be positive, one per unit", where="Problem.costs", got=self.costs[:8])
        if not self.choices or self.choices[0] < 1 or list(self.choices) != sorted(set(self.choices)):
            raise HalfbyteError("choices must be ascending bits", where="Problem.choices", got=self.choices)
        low, high = self.choices[0] / 8, self.choices[-1] / 8
        if not low <= self.budget <= high:
            raise HalfbyteError(
                "budget is out of range",
                where="target_compression",
                expected=f"{low:g} (all A{self.choices[0]}) to {high:g} (all A{self.choices[-1]})",
                got=self.budget,
            )
        if self.priority is not None:
            if len(self.priority) != self.size:
                raise HalfbyteError(
                    "one priority per unit is needed",
                    where="Problem.priority",
                    expected=self.size,
                    got=len(self.priority),
                )
            if not all(math.isfinite(value) for value in self.priority):
                raise HalfbyteError("priority is not finite", where="Problem.priority", fix="look at the sensitivities")

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.costs)

    @cached_property
    def total_cost(self) -> int:
        """Multiply-accumulates per token of all units."""
        return sum(self.costs)

    @cached_property
    def capacity(self) -> int:
        """The budget in multiply-accumulate bits: the most that :meth:`spent` may be."""
        return math.floor(8 * self.budget * self.total_cost * (1 + BUDGET_EPSILON))

    @cached_property
    def rank(self) -> np.ndarray:
        """``[units]`` in 0…1: place of each unit by ``priority / cost``; ties share the mean, 0.5 without priority."""
        if self.priority is None or self.size == 1:
            return np.full(self.size, 0.5)
        return (rankdata(self._wish) - 1) / (self.size - 1)

    @cached_property
    def _wish(self) -> np.ndarray:
        """``[units]``: priority per multiply-accumulate."""
        return np.zeros(self.size) if self.priority is None else np.array(self.priority) / np.array(self.costs)

    @cached_property
    def _lowering_order(self) -> list[int]:
        """Units in the order in which they give up bits: least wish, then largest cost, then last."""
        return sorted(range(self.size), key=lambda unit: (self._wish[unit], -self.costs[unit], -unit))

    def check(self, genome: Sequence[int]) -> Genome:
        """``genome`` as a tuple of plain ints.

        Raises:
            HalfbyteError: the length is not the number of units, or a value is not among the choices.
        """
        if len(genome) != self.size:
            raise HalfbyteError("genome has the wrong length", where="genome", expected=self.size, got=len(genome))
        bad = next((unit for unit, bits in enumerate(genome) if bits not in self.choices), None)
        if bad is not None:
            raise HalfbyteError(
                "bits are not among the choices", where=f"unit {bad}", expected=self.choices, got=genome[bad]
            )
        return tuple(int(bits) for bits in genome)

    def spent(self, genome: Sequence[int]) -> int:
        """Multiply-accumulate bits of ``genome``: the sum of cost × bits."""
        return sum(cost * bits for cost, bits in zip(self.costs, self.check(genome), strict=True))

    def fraction(self, genome: Sequence[int]) -> float:
        """Mean bits / 8 weighted by costs, the measure of the budget."""
        return self.spent(genome) / (8 * self.total_cost)

    def feasible(self, genome: Sequence[int]) -> bool:
        """Whether ``genome`` keeps to the budget, up to a relative 1e-12."""
        return self.spent(genome) <= self.capacity

    def repair(self, genome: Sequence[int], rng: np.random.Generator | None = None) -> Genome:
        """Lower units until the genome keeps to the budget; a feasible genome comes back unchanged.

        With :meth:`fill` this is the drop and add of Chu and Beasley, "A genetic algorithm for the multidimensional
        knapsack problem", Journal of Heuristics 4, 1998.

        Args:
            genome: bits per unit, over the budget or not.
            rng: None lowers the units with the least priority per cost first. With a generator the order is drawn at
                random, and the more a unit wants its bits, the later it tends to come.
        """
        bits = list(self.check(genome))
        over = self.spent(bits) - self.capacity
        if over <= 0:
            return tuple(bits)
        order = self._lowering_order if rng is None else self._sampled_order(1 - self.rank, rng)
        for unit in order:
            while over > 0 and bits[unit] > self.choices[0]:
                lower = self.choices[self.choices.index(bits[unit]) - 1]
                over -= self.costs[unit] * (bits[unit] - lower)
                bits[unit] = lower
        return tuple(bits)

    def fill(self, genome: Sequence[int], rng: np.random.Generator | None = None) -> Genome:
        """Raise units while the budget has room: more bits never hurt beyond noise, and unused budget is wasted.

        No unit of the result can be raised by one choice without breaking the budget. A genome that is over the
        budget comes back unchanged.

        Args:
            genome: bits per unit.
            rng: None raises the units with the most priority per cost first. With a generator the order is drawn at
                random, and the more a unit wants bits, the earlier it tends to come.
        """
        bits = list(self.check(genome))
        room = self.capacity - self.spent(bits)
        if room <= 0:
            return tuple(bits)
        order = reversed(self._lowering_order) if rng is None else self._sampled_order(self.rank, rng)
        for unit in order:
            while bits[unit] < self.choices[-1]:
                higher = self.choices[self.choices.index(bits[unit]) + 1]
                if self.costs[unit] * (higher - bits[unit]) > room:
                    break
                room -= self.costs[unit] * (higher - bits[unit])
                bits[unit] = higher
        return tuple(bits)

    def _sampled_order(self, preference: np.ndarray, rng: np.random.Generator) -> list[int]:
        """Units drawn without replacement, weight ``LEAST_WEIGHT + preference`` (``[units]``, 0…1).

        Keys ``log(u) / weight``, largest first: Efraimidis and Spirakis, "Weighted random sampling with a reservoir",
        Information Processing Letters 97, 2006.
        """
        keys = np.log1p(-rng.random(self.size)) / (LEAST_WEIGHT + preference)
        return np.argsort(-keys, kind="stable").tolist()

    def space(self, limit: int) -> tuple[Genome, ...] | None:
        """Every full genome (it keeps to the budget and no unit can be raised), in a fixed order.

        Returns:
            None when there are more than ``limit``, or when counting them would take more than ``SPACE_VISITS`` steps.
        """
        order = sorted(range(self.size), key=lambda unit: self.costs[unit])
        rest = [0]  # cost of the units after the first n of the order, by n
        for unit in reversed(order):
            rest.append(rest[-1] + self.costs[unit])
        rest.reverse()
        low, high = self.choices[0], self.choices[-1]
        found: list[Genome] = []
        # (bits of the first units in the order, what they spend, least cost of raising one of them)
        stack: list[tuple[Genome, int, float]] = [((), 0, math.inf)]
        for _ in range(SPACE_VISITS):
            if not stack or len(found) > limit:
                break
            head, spent, step = stack.pop()
            if spent + low * rest[len(head)] > self.capacity or spent + high * rest[len(head)] + step <= self.capacity:
                continue  # cannot keep to the budget, or will leave room for a step
            if len(head) == self.size:
                bits = dict(zip(order, head, strict=True))
                found.append(tuple(bits[unit] for unit in range(self.size)))
                continue
            cost = self.costs[order[len(head)]]
            for choice, above in zip(self.choices, (*self.choices[1:], math.inf), strict=True):
                stack.append(((*head, choice), spent + cost * choice, min(step, cost * (above - choice))))
        return None if stack or len(found) > limit else tuple(sorted(found))
