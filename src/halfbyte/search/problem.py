"""The search problem in numbers: one choice of activation bits per unit, a budget, and how to keep to it.

Costs are integers, so a genome's cost is exact and "fits" has no rounding in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import rankdata

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.knapsack import best_subset
from halfbyte.search.space import Genome, full_genomes, one_per_unit, sampled_order

BUDGET_EPSILON = 1e-12  # relative: 0.7 is not a binary fraction, and a genome that meets it exactly must fit


@dataclass(frozen=True)
class Problem:
    """Which genomes are legal, and which legal genome is near one that is not: a :class:`.space.SearchSpace`.

    A gene is a unit's bits. The line through the scores reads 1 where a unit is at the smaller of two choices.

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

    @property
    def capacity(self) -> int:
        """The budget in multiply-accumulate bits: the most that :meth:`spent` may be."""
        return math.floor(8 * self.budget * self.total_cost * (1 + BUDGET_EPSILON))

    @property
    def rank(self) -> np.ndarray:
        """``[units]`` in 0…1: place of each unit by ``priority / cost``; ties share the mean, 0.5 without priority."""
        return self._rank

    @cached_property
    def _rank(self) -> np.ndarray:
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
        order = self._lowering_order if rng is None else sampled_order(1 - self.rank, rng)
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
        order = reversed(self._lowering_order) if rng is None else sampled_order(self.rank, rng)
        for unit in order:
            while bits[unit] < self.choices[-1]:
                higher = self.choices[self.choices.index(bits[unit]) + 1]
                if self.costs[unit] * (higher - bits[unit]) > room:
                    break
                room -= self.costs[unit] * (higher - bits[unit])
                bits[unit] = higher
        return tuple(bits)

    def space(self, limit: int) -> tuple[Genome, ...] | None:
        """Every full genome (it keeps to the budget and no unit can be raised), in a fixed order.

        Returns:
            None when there are more than ``limit``, or when counting them would take too long.
        """
        costs = [[cost * bits for bits in self.choices] for cost in self.costs]
        found = full_genomes(costs, self.capacity, limit)
        return None if found is None else tuple(tuple(self.choices[level] for level in levels) for levels in found)

    @property
    def tops(self) -> np.ndarray:
        """``[units]``: the highest level of each unit; a level is a place among the choices."""
        return np.full(self.size, len(self.choices) - 1)

    @property
    def raise_costs(self) -> np.ndarray:
        """``[units, choices]``, multiply-accumulate bits: what the next choice costs more; 0 at the largest."""
        return np.multiply.outer(np.array(self.costs), np.diff(np.array((*self.choices, self.choices[-1]))))

    def levels(self, genome: Sequence[int]) -> np.ndarray:
        """``[units]``: the place of each unit's bits among the choices."""
        return np.array([self.choices.index(bits) for bits in genome])

    def of_levels(self, levels: np.ndarray) -> Genome:
        """The genome with these levels ``[units]``."""
        return tuple(self.choices[level] for level in levels.tolist())

    @property
    def has_line(self) -> bool:
        """Whether there are two choices: a line knows nothing of more."""
        return len(self.choices) == 2

    @property
    def prior(self) -> np.ndarray:
        """``[units]``: the priority, 0 without one: what a unit adds to the score at the smaller choice."""
        return np.zeros(self.size) if self.priority is None else np.array(self.priority)

    def features(self, genomes: Iterable[Genome]) -> np.ndarray:
        """``[genomes, units]``: 1 where a unit is at the smaller choice."""
        return (np.array(list(genomes), dtype=int).reshape(-1, self.size) != self.choices[-1]).astype(float)

    def solve(self, weights: np.ndarray) -> Genome:
        """The full genome that loses least where ``weights`` ``[units]``, lost at the smaller choice, add up."""
        return self.fill(self.knapsack(weights.tolist()))

    def knapsack(self, gain: Sequence[float]) -> Genome:
        """The units whose raise from the smallest to the largest choice gains most in sum, under the budget, exactly.

        Units that gain nothing stay at the smallest choice even where the budget has room; :meth:`fill` would raise
        them. Costs are integers and there is no solver tolerance: only the sums of gains are rounded, to float64.

        Args:
            gain: what each unit gains from the raise (KL saved), in any unit of measurement; may be negative.

        Raises:
            HalfbyteError: not one gain per unit, a gain is not finite, or the costs are so odd (no common divisor,
                gains almost in proportion) that more than ``knapsack.SUMS_LIMIT`` sums would have to be kept.
        """
        one_per_unit(gain, self.size, "gain")
        if not all(math.isfinite(value) for value in gain):
            raise HalfbyteError("gain is not finite", where="knapsack", fix="look at the sensitivities")
        low, high = self.choices[0], self.choices[-1]
        room = (self.capacity - low * self.total_cost) // (high - low)  # multiply-accumulates that may be raised
        useful = [unit for unit in range(self.size) if gain[unit] > 0 and self.costs[unit] <= room]
        useful.sort(key=lambda unit: (-gain[unit] / self.costs[unit], unit))
        raised = best_subset([self.costs[unit] for unit in useful], [float(gain[unit]) for unit in useful], room)
        bits = [low] * self.size
        for item in raised:
            bits[useful[item]] = high
        return tuple(bits)
