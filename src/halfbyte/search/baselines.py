"""Genomes that need no search: random, all alike, the sensitivity rule, the exact knapsack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halfbyte.search.problem import Problem
from halfbyte.search.space import Genome, SearchSpace, one_per_unit

RULE_THRESHOLD = 2.5  # MSE(A4) / MSE(A8) above which a unit keeps the larger choice
RULE_EDGE_THRESHOLD = 1.5  # the same for units of the first and the last block


def random_genome(problem: SearchSpace, rng: np.random.Generator) -> Genome:
    """A full genome that ignores what the units want.

    One unit after the other, drawn evenly from those whose next level still fits the budget, is raised until nothing
    fits.
    """
    levels, units, steps = np.zeros(problem.size, dtype=int), np.arange(problem.size), problem.raise_costs
    room = problem.capacity - problem.spent(problem.of_levels(levels))
    while True:
        step = steps[units, levels]  # [units], 0 where a unit is at the top
        fits = np.flatnonzero((step > 0) & (step <= room))
        if fits.size == 0:
            return problem.of_levels(levels)
        unit = int(rng.choice(fits))
        levels[unit] += 1
        room -= int(step[unit])


def all_choice(problem: Problem, bits: int) -> Genome:
    """Every unit at ``bits``, whether or not that keeps to the budget.

    Raises:
        HalfbyteError: ``bits`` is not among the choices.
    """
    return problem.check((bits,) * problem.size)


def rule_genome(
    problem: Problem,
    ratios: Sequence[float],
    first_last_mask: Sequence[bool],
    threshold: float = RULE_THRESHOLD,
    edge_threshold: float = RULE_EDGE_THRESHOLD,
) -> Genome:
    """The sensitivity rule: the largest choice for units that lose much at the smallest, whatever the budget says.

    The rule knows no budget; ``problem.repair`` makes its genome feasible.

    Args:
        problem: the units and the choices.
        ratios: MSE at the smallest choice / MSE at the largest, per unit (A4 against A8).
        first_last_mask: True for units of the first and the last block.
        threshold: ratio above which a unit gets the largest choice.
        edge_threshold: the same where ``first_last_mask`` is True.

    Raises:
        HalfbyteError: not one ratio and one mask entry per unit, or a ratio is NaN.
    """
    one_per_unit(ratios, problem.size, "ratios")
    one_per_unit(first_last_mask, problem.size, "first_last_mask")
    limits = [edge_threshold if edge else threshold for edge in first_last_mask]
    low, high = problem.choices[0], problem.choices[-1]
    return tuple(high if ratio > limit else low for ratio, limit in zip(ratios, limits, strict=True))


def knapsack_genome(problem: Problem, gain: Sequence[float]) -> Genome:
    """The units whose raise gains most in sum, under the budget, exactly; see :meth:`.problem.Problem.knapsack`."""
    return problem.knapsack(gain)
