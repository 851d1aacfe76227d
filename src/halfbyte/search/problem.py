"""The search problem: for each unit choose one format from its menu; the costs share a budget.

This is the multiple-choice knapsack problem, were it not that losses of several units together only nearly add up. So
the knapsack is where a search starts, and what breeding changes is repaired and filled to keep to the same budget.
Nothing here knows what a format is: a cost may be bytes, or multiply-accumulates times activation bits.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from halfbyte.core.errors import HalfbyteError

Genome = tuple[int, ...]  # the index of the chosen format of each unit; 0 is the cheapest

SPREAD = 0.5  # sd of the logarithm of a unit's random factor in repair and fill: about what predictions are wrong by
STATES_LIMIT = 2_000_000  # budgets that the knapsack's table tells apart


@dataclass(frozen=True)
class Problem:
    """For each unit one format from its menu; the costs share a budget.

    A genome is full when it keeps to the budget and no unit can be raised by one format.

    Attributes:
        costs: ``[unit][format]`` integers, not negative, ascending.
        losses: ``[unit][format]`` what each format alone is predicted to lose (nats per token, or any other unit); not
            negative, not rising with the cost. See :func:`pruned`.
        budget: the most that a genome may cost.

    Raises:
        HalfbyteError: no units, a menu that is empty or out of order, or a budget below the cheapest genome.
    """

    costs: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    budget: int

    def __post_init__(self) -> None:
        # Plain numbers, also from NumPy: values that JSON can hold.
        object.__setattr__(self, "costs", tuple(tuple(int(cost) for cost in menu) for menu in self.costs))
        object.__setattr__(self, "losses", tuple(tuple(float(loss) for loss in menu) for menu in self.losses))
        if not self.costs:
            raise HalfbyteError("problem: there are no units to choose formats for")
        if len(self.losses) != self.size:
            raise HalfbyteError(f"problem: expected losses of {self.size} units, got {len(self.losses)}")
        for unit, (costs, losses) in enumerate(zip(self.costs, self.losses, strict=True)):
            _check_menu(costs, losses, f"unit {unit}")
        least, most = (sum(menu[end] for menu in self.costs) for end in (0, -1))
        if not (math.isfinite(self.budget) and self.budget >= least):
            raise HalfbyteError(
                f"budget: too small, expected {least} (all units at their cheapest) to {most}, got {self.budget}",
                fix="allow more, or offer cheaper formats",
            )
        object.__setattr__(self, "budget", math.floor(self.budget))

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.costs)

    @cached_property
    def tops(self) -> np.ndarray:
        """``[units]``: the index of the last format of each menu."""
        return np.array([len(menu) - 1 for menu in self.costs])

    @property
    def cheapest(self) -> Genome:
        """The first format everywhere."""
        return (0,) * self.size

    @property
    def dearest(self) -> Genome:
        """The last format everywhere, whether or not the budget allows it."""
        return tuple(self.tops.tolist())

    @cached_property
    def steps(self) -> np.ndarray:
        """``[units, formats]``: what the next format costs more; 0 from the last one on."""
        costs = self._table(self.costs)
        return np.diff(costs, append=costs[:, -1:])

    @cached_property
    def _wishes(self) -> np.ndarray:
        """``[units, formats]``: loss that the next format saves per cost; 0 from the last one on."""
        losses = self._table(self.losses)
        return -np.diff(losses, append=losses[:, -1:]) / np.maximum(self.steps, 1)

    @cached_property
    def rank(self) -> np.ndarray:
        """``[units]`` in 0…1: place of each unit by what its whole menu saves per cost; ties share the mean."""
        if self.size == 1:
            return np.full(1, 0.5)
        saved = [
            (losses[0] - losses[-1]) / max(costs[-1] - costs[0], 1)
            for costs, losses in zip(self.costs, self.losses, strict=True)
        ]
        _, place, count = np.unique(saved, return_inverse=True, return_counts=True)
        middle = np.cumsum(count) - (count + 1) / 2
        return middle[place] / (self.size - 1)

    def check(self, genome: Sequence[int]) -> Genome:
        """``genome`` as a tuple of plain ints.

        Raises:
            HalfbyteError: the length is not the number of units, or a value is not an index into its unit's menu.
        """
        if len(genome) != self.size:
            raise HalfbyteError(f"genome: wrong length, expected {self.size} units, got {len(genome)}")
        for unit, (choice, menu) in enumerate(zip(genome, self.costs, strict=True)):
            if choice not in range(len(menu)):
                raise HalfbyteError(f"unit {unit}: no such format, expected 0 to {len(menu) - 1}, got {choice}")
        return tuple(int(choice) for choice in genome)

    def spent(self, genome: Sequence[int]) -> int:
        """What ``genome`` costs."""
        return sum(menu[choice] for menu, choice in zip(self.costs, self.check(genome), strict=True))

    def feasible(self, genome: Sequence[int]) -> bool:
        """Whether ``genome`` keeps to the budget."""
        return self.spent(genome) <= self.budget

    def predicted(self, genome: Sequence[int]) -> float:
        """The sum of the losses of ``genome``'s formats, each alone, in the unit of ``losses``."""
        return math.fsum(menu[choice] for menu, choice in zip(self.losses, self.check(genome), strict=True))

    def with_budget(self, budget: int) -> Problem:
        """The same menus under another budget."""
        return replace(self, budget=budget)

    def with_losses(self, losses: Sequence[Sequence[float]]) -> Problem:
        """The same costs and budget with other predicted losses."""
        return replace(self, losses=tuple(tuple(menu) for menu in losses))

    def repair(self, genome: Sequence[int], rng: np.random.Generator | None = None) -> Genome:
        """Lower formats step by step, where least loss is saved per cost, until the genome keeps to the budget.

        A feasible genome comes back unchanged. With :meth:`fill` this is the drop and add of Chu and Beasley, "A
        genetic algorithm for the multidimensional knapsack problem", Journal of Heuristics 4, 1998.

        Args:
            genome: over the budget or not.
            rng: with a generator the losses of each unit are first multiplied by a log-normal factor of its own.
        """
        chosen = list(self.check(genome))
        over = self.spent(chosen) - self.budget
        if over <= 0:
            return tuple(chosen)
        wishes, steps = self._drawn_wishes(rng), self.steps.tolist()
        # The least loss per cost first, then the largest step, then the last unit.
        heap = [(wishes[u][at - 1], -steps[u][at - 1], -u) for u, at in enumerate(chosen) if at > 0]
        heapq.heapify(heap)
        while over > 0:
            _, saved, unit = heapq.heappop(heap)
            over, unit = over + saved, -unit
            chosen[unit] -= 1
            if (at := chosen[unit]) > 0:
                heapq.heappush(heap, (wishes[unit][at - 1], -steps[unit][at - 1], -unit))
        return tuple(chosen)

    def fill(self, genome: Sequence[int], rng: np.random.Generator | None = None) -> Genome:
        """Raise formats step by step, where most loss is saved per cost, while something fits.

        The result is full. A genome that is over the budget comes back unchanged.

        Args:
            genome: within the budget.
            rng: with a generator the losses of each unit are first multiplied by a log-normal factor of its own.
        """
        chosen = list(self.check(genome))
        left = self.budget - self.spent(chosen)
        if left <= 0:
            return tuple(chosen)
        wishes, steps = self._drawn_wishes(rng), self.steps.tolist()
        # The most loss per cost first, then the smallest step, then the first unit.
        heap = [(-wishes[u][at], steps[u][at], u) for u, at in enumerate(chosen) if steps[u][at] > 0]
        heapq.heapify(heap)
        while heap:
            _, step, unit = heapq.heappop(heap)
            if step > left:
                continue  # and it never will fit: what is left only shrinks
            left -= step
            chosen[unit] += 1
            if steps[unit][at := chosen[unit]] > 0:
                heapq.heappush(heap, (-wishes[unit][at], steps[unit][at], unit))
        return tuple(chosen)

    def knapsack(self) -> Genome:
        """A full genome with the least predicted loss, by dynamic programming over what it costs.

        Kellerer, Pferschy and Pisinger, "Knapsack Problems", Springer 2004, chapter 11. What formats cost above the
        cheapest is divided by the greatest common divisor first, and the answer is exact. Only where more than
        ``STATES_LIMIT`` budgets would remain, it is divided by a multiple and rounded up: the answer keeps to the
        budget, and is no worse than any that leaves (number of units) / ``STATES_LIMIT`` of the budget unspent.
        """
        if self.feasible(self.dearest):
            return self.dearest
        raises = [[cost - menu[0] for cost in menu] for menu in self.costs]
        left = self.budget - self.spent(self.cheapest)
        divisor = math.gcd(*itertools.chain(*raises))
        divisor *= max(1, math.ceil(left // divisor / STATES_LIMIT))
        rounded = [[-(-cost // divisor) for cost in menu] for menu in raises]
        return self.fill(_least_loss(rounded, self.losses, left // divisor))

    def _drawn_wishes(self, rng: np.random.Generator | None) -> list[list[float]]:
        """``[unit][format]``: loss that the next format saves per cost, times a factor per unit if there is ``rng``."""
        if rng is None:
            return self._wishes.tolist()
        return (self._wishes * np.exp(SPREAD * rng.standard_normal((self.size, 1)))).tolist()

    def _table(self, menus: Sequence[Sequence[float]]) -> np.ndarray:
        """``[units, formats]``; a shorter menu goes on with its last value."""
        width = max(map(len, menus))
        return np.array([[*menu, *[menu[-1]] * (width - len(menu))] for menu in menus])


def random_genome(problem: Problem, rng: np.random.Generator) -> Genome:
    """A full genome that ignores what the units lose.

    One unit after the other, drawn evenly from those whose next format still fits, is raised until nothing fits.
    """
    chosen = np.zeros(problem.size, dtype=int)
    units = np.arange(problem.size)
    left = problem.budget - problem.spent(problem.cheapest)
    while True:
        step = problem.steps[units, chosen]  # [units], 0 at the last format
        fits = np.flatnonzero((step > 0) & (step <= left))
        if fits.size == 0:
            return tuple(chosen.tolist())
        unit = fits[rng.integers(fits.size)]
        chosen[unit] += 1
        left -= int(step[unit])


def pruned(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Indices of the formats worth offering, by rising cost: each loses less than every other that costs no more.

    Args:
        costs, losses: of each format of one unit, in any order.

    Raises:
        HalfbyteError: not one loss per cost, or a loss is NaN.
    """
    check_values(losses, len(costs), "losses")
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], losses[index], index)):
        if not kept or losses[index] < losses[kept[-1]]:
            kept.append(index)
    return kept


def check_values(values: Sequence[float], count: int, name: str) -> None:
    """Refuse ``values`` that are not ``count`` in number, or that hold a NaN.

    Raises:
        HalfbyteError: they are.
    """
    if len(values) != count:
        raise HalfbyteError(f"{name}: expected {count} values, got {len(values)}")
    if any(math.isnan(value) for value in values):
        raise HalfbyteError(f"{name}: a value is NaN", fix="look at the sensitivities")


def _check_menu(costs: Sequence[int], losses: Sequence[float], where: str) -> None:
    """Refuse a menu that a :class:`Problem` cannot offer."""
    if not costs or costs[0] < 0 or any(after <= before for before, after in itertools.pairwise(costs)):
        raise HalfbyteError(f"{where}: expected ascending costs, got {costs}", fix="prune the menu")
    if len(losses) != len(costs):
        raise HalfbyteError(f"{where}: expected one loss per format, {len(costs)}, got {len(losses)}")
    if not all(math.isfinite(loss) for loss in losses):
        raise HalfbyteError(f"{where}: a loss is not finite, got {losses}", fix="look at the sensitivities")
    if losses[-1] < 0 or any(after > before for before, after in itertools.pairwise(losses)):
        raise HalfbyteError(
            f"{where}: losses must not be negative, nor rise with the cost, got {losses}", fix="prune the menu"
        )


def _least_loss(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The format of each unit, with the least sum of losses among those that cost at most ``budget`` together.

    Args:
        costs: ``[unit][format]`` integers, ascending from 0.
        losses: ``[unit][format]``.
        budget: not negative; the table has a column for each budget up to it.
    """
    least = np.zeros(budget + 1)  # [budgets]: the least loss of the units so far that each budget allows
    kind = np.uint8 if max(map(len, costs)) <= 256 else np.uint16
    chosen = np.zeros((len(costs), budget + 1), dtype=kind)  # [units, budgets]: the format it has there
    for row, menu, unit_losses in zip(chosen, costs, losses, strict=True):
        best = least + unit_losses[0]
        for choice in range(1, len(menu)):
            cost = menu[choice]
            if cost > budget:
                break
            with_choice = least[: budget + 1 - cost] + unit_losses[choice]
            better = with_choice < best[cost:]
            np.copyto(best[cost:], with_choice, where=better)
            np.copyto(row[cost:], choice, where=better)
        least = best
    genome = []
    for row, menu in zip(reversed(chosen), reversed(costs), strict=True):
        choice = int(row[budget])
        genome.append(choice)
        budget -= menu[choice]
    return genome[::-1]
