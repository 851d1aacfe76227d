"""Genomes that need no search: random, all alike, the sensitivity rule, the exact knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from halfbyte.errors import HalfbyteError
from halfbyte.search.problem import Genome, Problem

RULE_THRESHOLD = 2.5  # MSE(A4) / MSE(A8) above which a unit keeps the larger choice
RULE_EDGE_THRESHOLD = 1.5  # the same for units of the first and the last block
GAIN_SCALE = 1e4  # largest gain given to HiGHS, whose absolute gap of 1e-6 is then a relative 1e-10
COVER_CUTS = 20  # how often the knapsack is solved again because the solver's tolerance broke the budget


def random_genome(problem: Problem, rng: np.random.Generator) -> Genome:
    """A feasible genome that ignores the priority: one unit after the other, drawn evenly from those whose next choice
    still fits the budget, is raised until nothing fits."""
    bits = np.full(problem.size, problem.choices[0])
    costs = np.array(problem.costs)
    higher = dict(zip(problem.choices, (*problem.choices[1:], problem.choices[-1]), strict=True))
    room = problem.capacity - problem.spent(bits.tolist())
    while True:
        step = costs * (np.array([higher[b] for b in bits.tolist()]) - bits)  # 0 where a unit is at the top
        fits = np.flatnonzero((step > 0) & (step <= room))
        if fits.size == 0:
            return tuple(bits.tolist())
        unit = int(rng.choice(fits))
        bits[unit] = higher[int(bits[unit])]
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
    _one_per_unit(problem, ratios, "ratios")
    _one_per_unit(problem, first_last_mask, "first_last_mask")
    limits = [edge_threshold if edge else threshold for edge in first_last_mask]
    low, high = problem.choices[0], problem.choices[-1]
    return tuple(high if ratio > limit else low for ratio, limit in zip(ratios, limits, strict=True))


def knapsack_genome(problem: Problem, gain: Sequence[float]) -> Genome:
    """The units whose raise from the smallest to the largest choice gains most in sum, under the budget, exactly.

    A 0/1 knapsack as a mixed-integer linear program, solved by HiGHS (Huangfu and Hall, "Parallelizing the dual revised
    simplex method", Mathematical Programming Computation 10, 2018). Units that gain nothing stay at the smallest
    choice even where the budget has room; ``problem.fill`` would raise them.

    Args:
        problem: the units, their costs and the budget.
        gain: what each unit gains from the raise (KL saved), in any unit of measurement; may be negative.

    Raises:
        HalfbyteError: not one gain per unit, a gain is not finite, or the solver found no optimum.
    """
    _one_per_unit(problem, gain, "gain")
    gains = np.maximum(np.asarray(gain, dtype=float), 0)
    if not np.isfinite(gains).all():
        raise HalfbyteError("gain is not finite", where="knapsack", fix="look at the sensitivities")
    low, high = problem.choices[0], problem.choices[-1]
    room = (problem.capacity - low * problem.total_cost) // (high - low)  # multiply-accumulates that may be raised
    divisor = math.gcd(*problem.costs)
    costs, room = [cost // divisor for cost in problem.costs], room // divisor
    candidates = [bool(g > 0 and cost <= room) for g, cost in zip(gains, costs, strict=True)]
    if not any(candidates):
        return (low,) * problem.size
    objective = -gains * (GAIN_SCALE / gains.max())
    constraints = [LinearConstraint(np.array([costs], dtype=float), -np.inf, room)]
    for _ in range(COVER_CUTS):
        result = milp(
            objective,
            integrality=np.ones(problem.size),
            bounds=Bounds(0, np.array(candidates, dtype=float)),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None or result.status != 0:
            break
        raised = np.asarray(result.x) > 0.5
        if sum(cost for cost, up in zip(costs, raised.tolist(), strict=True) if up) <= room:
            return tuple(high if up else low for up in raised.tolist())
        # To the solver 1 - 1e-6 is an integer. These units together break the budget, so one of them stays low.
        constraints.append(LinearConstraint(raised[None].astype(float), -np.inf, int(raised.sum()) - 1))
    raise HalfbyteError("the knapsack solver found no optimum", where="knapsack", got=getattr(result, "message", "nothing"))


def _one_per_unit(problem: Problem, values: Sequence[object], name: str) -> None:
    if len(values) != problem.size:
        raise HalfbyteError("one value per unit is needed", where=name, expected=problem.size, got=len(values))
    if any(value != value for value in values):  # only NaN differs from itself
        raise HalfbyteError("value is NaN", where=name, fix="look at the sensitivities")
