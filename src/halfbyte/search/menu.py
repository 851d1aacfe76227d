"""The search problem of weight types: one choice per unit from the unit's own menu, under a budget of bytes.

Each choice comes with its size and with the loss that was predicted or measured for it alone. Genes are places on the
menus, so that a search needs to know nothing of the types behind them. What the choices lose is relative everywhere:
nothing depends on the unit of the losses.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import rankdata

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.knapsack import MultipleChoice
from halfbyte.search.space import Genome, full_genomes, one_per_unit

SPREAD = 0.5  # sd of the logarithm of a unit's random factor in repair and fill: about what predictions are wrong by
LEAST_FACTOR = 1e-3  # of the mean absolute weight: a smaller weight, or a negative one, counts as this


@dataclass(frozen=True)
class Menu:
    """Which genomes are legal, and which legal genome is near one that is not: a :class:`.space.SearchSpace`.

    A gene is a place on its unit's menu. The line through the scores reads the predicted loss of each unit's choice,
    and expects the weight 1 (times a common factor) for each.

    Attributes:
        costs: bytes of each choice of each unit, ascending.
        losses: loss that each choice brings on its own (nats per token, or any other unit), not negative, never rising
            along a menu; see :func:`pruned`.
        capacity: most bytes of all units together; with more than all units at their largest nothing is left to choose.

    Raises:
        HalfbyteError: no units, an empty menu, costs or losses out of order, not one loss per cost, a loss that is not
            finite, or a capacity below the smallest total.
    """

    costs: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    capacity: int

    def __post_init__(self) -> None:
        # Plain numbers, also from NumPy: values that JSON can hold.
        object.__setattr__(self, "costs", tuple(tuple(int(cost) for cost in menu) for menu in self.costs))
        object.__setattr__(self, "losses", tuple(tuple(float(loss) for loss in menu) for menu in self.losses))
        if not self.costs:
            raise HalfbyteError("there are no units", where="Menu.costs")
        if len(self.losses) != len(self.costs):
            raise HalfbyteError(
                "one menu of losses per unit is needed",
                where="Menu.losses",
                expected=len(self.costs),
                got=len(self.losses),
            )
        for unit, (costs, losses) in enumerate(zip(self.costs, self.losses, strict=True)):
            _check_menu(costs, losses, f"unit {unit}")
        if not math.isfinite(self.capacity):
            raise HalfbyteError("capacity is not finite", where="Menu.capacity", got=self.capacity)
        object.__setattr__(self, "capacity", math.floor(self.capacity))
        least, most = (sum(menu[place] for menu in self.costs) for place in (0, -1))
        if self.capacity < least:
            raise HalfbyteError(
                "capacity is below the smallest choices",
                where="Menu.capacity",
                expected=f"at least {least} bytes (all units at their largest take {most})",
                got=f"{self.capacity} bytes",
                fix="allow more bytes, or offer smaller types",
            )

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.costs)

    @property
    def tops(self) -> np.ndarray:
        """``[units]``: the last place of each menu."""
        return self._knapsack.tops

    @property
    def raise_costs(self) -> np.ndarray:
        """``[units, places]``, bytes: what the next place costs more; 0 from the last place on."""
        return self._knapsack.raise_costs

    @property
    def rank(self) -> np.ndarray:
        """``[units]`` in 0…1: place of each unit by what its whole menu saves per byte; ties share the mean."""
        return self._rank

    @cached_property
    def _rank(self) -> np.ndarray:
        if self.size == 1:
            return np.full(1, 0.5)
        costs, losses = self._knapsack.costs, self._knapsack.losses
        saved, spent = losses[:, 0] - losses[:, -1], costs[:, -1] - costs[:, 0]
        return (rankdata(saved / np.maximum(spent, 1)) - 1) / (self.size - 1)

    @property
    def has_line(self) -> bool:
        """Always: a line over losses needs no more than a factor for each unit."""
        return True

    @property
    def prior(self) -> np.ndarray:
        """``[units]``: 1, each unit loses what was predicted."""
        return np.ones(self.size)

    @cached_property
    def _knapsack(self) -> MultipleChoice:
        """The menus as tables ``[units, places]``; a shorter menu goes on with its last choice."""
        width = max(map(len, self.costs))
        costs = [[*menu, *menu[-1:] * (width - len(menu))] for menu in self.costs]
        losses = [[*menu, *menu[-1:] * (width - len(menu))] for menu in self.losses]
        tops = np.array([len(menu) - 1 for menu in self.costs])
        return MultipleChoice(np.array(costs, dtype=np.int64), np.array(losses), tops, self.capacity)

    def check(self, genome: Sequence[int]) -> Genome:
        """``genome`` as a tuple of plain ints.

        Raises:
            HalfbyteError: the length is not the number of units, or a gene is not a place on its menu.
        """
        if len(genome) != self.size:
            raise HalfbyteError("genome has the wrong length", where="genome", expected=self.size, got=len(genome))
        for unit, (gene, menu) in enumerate(zip(genome, self.costs, strict=True)):
            if gene not in range(len(menu)):
                raise HalfbyteError(
                    "gene is not a place on its menu", where=f"unit {unit}", expected=f"0 to {len(menu) - 1}", got=gene
                )
        return tuple(int(gene) for gene in genome)

    def spent(self, genome: Sequence[int]) -> int:
        """Bytes of ``genome``."""
        return sum(menu[gene] for menu, gene in zip(self.costs, self.check(genome), strict=True))

    def predicted(self, genome: Sequence[int]) -> float:
        """The sum of the losses of ``genome``'s choices, each alone, in the unit of ``losses``."""
        return math.fsum(menu[gene] for menu, gene in zip(self.losses, self.check(genome), strict=True))

    def feasible(self, genome: Sequence[int]) -> bool:
        """Whether ``genome`` keeps to the budget."""
        return self.spent(genome) <= self.capacity

    def levels(self, genome: Sequence[int]) -> np.ndarray:
        """``[units]``: the genes."""
        return np.array(genome, dtype=np.int64)

    def of_levels(self, levels: np.ndarray) -> Genome:
        """The genome with these places ``[units]``."""
        return tuple(levels.tolist())

    def features(self, genomes: Iterable[Genome]) -> np.ndarray:
        """``[genomes, units]``: the loss of each unit's choice alone."""
        places = np.array(list(genomes), dtype=np.int64).reshape(-1, self.size)
        return self._knapsack.losses[np.arange(self.size), places]

    def space(self, limit: int) -> tuple[Genome, ...] | None:
        """Every full genome (it keeps to the budget and no unit can be raised by one place), in a fixed order.

        Returns:
            None when there are more than ``limit``, or when counting them would take too long.
        """
        found = full_genomes(self.costs, self.capacity, limit)
        return None if found is None else tuple(found)

    def repair(self, genome: Sequence[int], rng: np.random.Generator | None = None) -> Genome:
        """Lower units place by place, where the loss per byte is least, until the genome keeps to the budget.

        A feasible genome comes back unchanged.

        Args:
            genome: a place per unit, over the budget or not.
            rng: with a generator each unit's losses are first multiplied by a random factor of its own, log-normal.
        """
        levels = list(self.check(genome))
        over = self.spent(levels) - self.capacity
        if over <= 0:
            return tuple(levels)
        wishes, steps = self._wishes(rng).tolist(), self.raise_costs.tolist()
        # The least loss per byte first, then the largest step, then the last unit.
        heap = [(wishes[u][at - 1], -steps[u][at - 1], -u) for u, at in enumerate(levels) if at > 0]
        heapq.heapify(heap)
        while over > 0:
            _, saved, unit = heapq.heappop(heap)
            over, unit = over + saved, -unit
            levels[unit] -= 1
            if (at := levels[unit]) > 0:
                heapq.heappush(heap, (wishes[unit][at - 1], -steps[unit][at - 1], -unit))
        return tuple(levels)

    def fill(self, genome: Sequence[int], rng: np.random.Generator | None = None) -> Genome:
        """Raise units place by place, where most loss is saved per byte, while the budget has room.

        No unit of the result can be raised by one place without breaking the budget. A genome that is over the budget
        comes back unchanged.

        Args:
            genome: a place per unit.
            rng: with a generator each unit's losses are first multiplied by a random factor of its own, log-normal.
        """
        levels = list(self.check(genome))
        if self.spent(levels) >= self.capacity:
            return tuple(levels)
        return self.of_levels(self._knapsack.filled(np.array(levels, dtype=np.int64), self._wishes(rng)))

    def _wishes(self, rng: np.random.Generator | None) -> np.ndarray:
        """``[units, places]``: loss that the next place saves per byte, times a factor per unit if there is ``rng``."""
        if rng is None:
            return self._knapsack.wishes
        return self._knapsack.wishes * np.exp(SPREAD * rng.standard_normal((self.size, 1)))

    def _factors(self, weights: Sequence[float] | np.ndarray | None) -> np.ndarray:
        """``[units]``: ``weights`` with their mean size 1, and none below ``LEAST_FACTOR``; None is 1 for all.

        Raises:
            HalfbyteError: not one weight per unit, or a weight is not finite.
        """
        factors = np.ones(self.size) if weights is None else np.array(weights, dtype=float)
        one_per_unit(factors.tolist(), self.size, "weights")
        if not np.isfinite(factors).all():
            raise HalfbyteError("weight is not finite", where="weights", fix="look at the scores")
        largest = np.abs(factors).max()
        factors = factors / largest if largest > 0 else np.ones(self.size)  # no sum overflows, no mean is 0
        return np.maximum(factors / np.abs(factors).mean(), LEAST_FACTOR)

    def solve(self, weights: Sequence[float] | np.ndarray) -> Genome:
        """A full genome with nearly the least Σ weight · loss, in about a millisecond.

        Args:
            weights: ``[units]``; below ``LEAST_FACTOR`` of their mean size, or negative, they count as that.

        Raises:
            HalfbyteError: not one weight per unit, or a weight is not finite.
        """
        return self.of_levels(self._knapsack.greedy(self._factors(weights)))

    def knapsack(self, weights: Sequence[float] | np.ndarray | None = None) -> Genome:
        """A full genome with the least Σ weight · loss, exactly but for the rounding of sums.

        Args:
            weights: ``[units]``, as for :meth:`solve`; None is 1 for all.

        Raises:
            HalfbyteError: not one weight per unit, a weight is not finite, or the costs and losses are so odd (no
                common divisor, in proportion) that more than ``knapsack.SUMS_LIMIT`` sums would have to be kept.
        """
        return self.of_levels(self._knapsack.exact(self._factors(weights)))


def pruned(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Places of the choices worth offering, by rising cost: each loses less than every other that costs no more.

    Args:
        costs: bytes of each choice of one unit, in any order.
        losses: what each choice loses.

    Raises:
        HalfbyteError: not one loss per cost, or a loss is NaN.
    """
    one_per_unit(losses, len(costs), "losses")
    kept: list[int] = []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], losses[place], place)):
        if not kept or losses[place] < losses[kept[-1]]:
            kept.append(place)
    return kept


def _check_menu(costs: tuple[int, ...], losses: tuple[float, ...], where: str) -> None:
    """Refuse a menu that :class:`Menu` cannot offer."""
    if not costs or costs[0] < 0 or any(after <= before for before, after in itertools.pairwise(costs)):
        raise HalfbyteError("costs must be bytes, ascending", where=where, got=costs, fix="prune the menu")
    if len(losses) != len(costs):
        raise HalfbyteError("one loss per choice is needed", where=where, expected=len(costs), got=len(losses))
    if not all(math.isfinite(loss) for loss in losses):
        raise HalfbyteError("loss is not finite", where=where, got=losses, fix="look at the sensitivities")
    if losses[-1] < 0 or any(after > before for before, after in itertools.pairwise(losses)):
        raise HalfbyteError(
            "losses must not be negative, nor rise with the cost", where=where, got=losses, fix="prune the menu"
        )
