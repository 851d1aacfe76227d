"""Genomes that need no search beside the knapsack: random ones, and the sensitivity rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halfbyte.search.problem import Genome, Problem, check_values

RULE_THRESHOLD = 2.5  # MSE(A4) / MSE(A8) above which a unit keeps the larger format
RULE_EDGE_THRESHOLD = 1.5  # the same for units of the first and the last block


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


def rule_genome(problem: Problem, ratios: Sequence[float], edges: Sequence[bool]) -> Genome:
    """The sensitivity rule: the last format for units that lose much at the first, whatever the budget says.

    ``problem.repair`` makes the genome feasible.

    Args:
        ratios: MSE at the first format / MSE at the last, per unit (A4 against A8).
        edges: True for units of the first and the last block.

    Raises:
        HalfbyteError: not one ratio and one edge per unit, or a ratio is NaN.
    """
    check_values(ratios, problem.size, "ratios")
    check_values(edges, problem.size, "edges")
    limits = [RULE_EDGE_THRESHOLD if edge else RULE_THRESHOLD for edge in edges]
    return tuple(top if ratio > limit else 0 for top, ratio, limit in zip(problem.dearest, ratios, limits, strict=True))
