"""What a search has to know of a problem: one gene per unit, each gene a level of its unit, and a budget.

:class:`.problem.Problem` (activation bits) and :class:`.menu.Menu` (weight types) are such spaces. What a gene says is
the space's own; a level counts from 0, the cheapest, to the unit's top. Higher levels cost more and lose less. A genome
is full when it keeps to the budget and no unit can be raised by one level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Protocol

import numpy as np

from halfbyte.core.errors import HalfbyteError

Genome = tuple[int, ...]

LEAST_WEIGHT = 0.1  # sampling weight of the last unit in rank; the first has 1 + LEAST_WEIGHT
SPACE_VISITS = 50_000  # nodes that full_genomes looks at before it gives up


class SearchSpace(Protocol):
    """A frozen dataclass that says which genomes are legal, and which legal genome is near one that is not.

    A line through all scores (:mod:`.surrogate`) reads a genome as one feature per unit:
    score ≈ base + Σ weight[unit] · feature[unit].
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def size(self) -> int:
        """Number of units."""
        ...

    @property
    def capacity(self) -> int:
        """The most that :meth:`spent` may be."""
        ...

    @property
    def tops(self) -> np.ndarray:
        """``[units]``: the highest level of each unit."""
        ...

    @property
    def raise_costs(self) -> np.ndarray:
        """``[units, levels]``: what raising a unit from this level by one costs; 0 from its top on."""
        ...

    @property
    def rank(self) -> np.ndarray:
        """``[units]`` in 0…1: place of each unit by how much it wants a higher level."""
        ...

    @property
    def has_line(self) -> bool:
        """Whether the features say all that a line could use; without, :mod:`.surrogate` knows nothing."""
        ...

    @property
    def prior(self) -> np.ndarray:
        """``[units]``: the weights to expect before there are scores, up to a common factor; all 0 is no opinion."""
        ...

    def check(self, genome: Sequence[int]) -> Genome:
        """``genome`` as a tuple of plain ints; HalfbyteError where it is none of this space."""
        ...

    def spent(self, genome: Sequence[int]) -> int:
        """What ``genome`` takes of the budget."""
        ...

    def feasible(self, genome: Sequence[int]) -> bool:
        """Whether ``genome`` keeps to the budget."""
        ...

    def repair(self, genome: Sequence[int], rng: np.random.Generator | None = None) -> Genome:
        """Lower units until the genome keeps to the budget; a feasible genome comes back unchanged."""
        ...

    def fill(self, genome: Sequence[int], rng: np.random.Generator | None = None) -> Genome:
        """Raise units until the genome is full; one that is over the budget comes back unchanged."""
        ...

    def levels(self, genome: Sequence[int]) -> np.ndarray:
        """``[units]``: the level of each gene."""
        ...

    def of_levels(self, levels: np.ndarray) -> Genome:
        """The genome with these levels ``[units]``."""
        ...

    def features(self, genomes: Iterable[Genome]) -> np.ndarray:
        """``[genomes, units]``: what the line reads."""
        ...

    def solve(self, weights: np.ndarray) -> Genome:
        """The full genome that loses least, or nearly so, where the line has these weights ``[units]``."""
        ...

    def space(self, limit: int) -> tuple[Genome, ...] | None:
        """Every full genome in a fixed order, or None when there are more than ``limit`` or too many to count."""
        ...


def sampled_order(preference: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Units drawn without replacement, weight ``LEAST_WEIGHT + preference`` (``[units]``, 0…1).

    Keys ``log(u) / weight``, largest first: Efraimidis and Spirakis, "Weighted random sampling with a reservoir",
    Information Processing Letters 97, 2006.
    """
    keys = np.log1p(-rng.random(preference.size)) / (LEAST_WEIGHT + preference)
    return np.argsort(-keys, kind="stable").tolist()


def full_genomes(costs: Sequence[Sequence[int]], capacity: int, limit: int) -> list[tuple[int, ...]] | None:
    """The levels of every full genome, in rising order.

    Args:
        costs: of each level of each unit, ascending.
        capacity: the most that a genome may cost.
        limit: of how many to list.

    Returns:
        None when there are more than ``limit``, or when counting them would take more than ``SPACE_VISITS`` steps.
    """
    order = sorted(range(len(costs)), key=lambda unit: costs[unit][-1] - costs[unit][0])
    least, most = [0], [0]  # costs at the bottom and at the top of the units after the first n of the order, by n
    for unit in reversed(order):
        least.append(least[-1] + costs[unit][0])
        most.append(most[-1] + costs[unit][-1])
    least.reverse()
    most.reverse()
    found: list[tuple[int, ...]] = []
    # (levels of the first units in the order, what they spend, least cost of raising one of them)
    stack: list[tuple[tuple[int, ...], int, float]] = [((), 0, math.inf)]
    for _ in range(SPACE_VISITS):
        if not stack or len(found) > limit:
            break
        head, spent, step = stack.pop()
        if spent + least[len(head)] > capacity or spent + most[len(head)] + step <= capacity:
            continue  # cannot keep to the budget, or will leave room for a step
        if len(head) == len(order):
            levels = dict(zip(order, head, strict=True))
            found.append(tuple(levels[unit] for unit in range(len(order))))
            continue
        menu = costs[order[len(head)]]
        for level, (cost, above) in enumerate(zip(menu, (*menu[1:], math.inf), strict=True)):
            stack.append(((*head, level), spent + cost, min(step, above - cost)))
    return None if stack or len(found) > limit else sorted(found)


def one_per_unit(values: Sequence[Any], size: int, name: str) -> None:
    """Refuse ``values`` that are not ``size`` in number, or that hold a NaN.

    Raises:
        HalfbyteError: they are.
    """
    if len(values) != size:
        raise HalfbyteError("one value per unit is needed", where=name, expected=size, got=len(values))
    if any(value != value for value in values):  # only NaN differs from itself
        raise HalfbyteError("value is NaN", where=name, fix="look at the sensitivities")
