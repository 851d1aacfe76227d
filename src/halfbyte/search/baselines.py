"""Genomes that need no search: random, all alike, the sensitivity rule, the exact knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.search.problem import Genome, Problem

RULE_THRESHOLD = 2.5  # MSE(A4) / MSE(A8) above which a unit keeps the larger choice
RULE_EDGE_THRESHOLD = 1.5  # the same for units of the first and the last block
ROUNDING = 1e-12  # relative to all gains: sums of the same gains in another order differ by less
SUMS_LIMIT = 2_000_000  # models stay far below: there are at most total cost / greatest common divisor, some thousands


def random_genome(problem: Problem, rng: np.random.Generator) -> Genome:
    """A full genome that ignores the priority.

    One unit after the other, drawn evenly from those whose next choice still fits the budget, is raised until nothing
    fits.
    """
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

    Units that gain nothing stay at the smallest choice even where the budget has room; ``problem.fill`` would raise
    them. Costs are integers and there is no solver tolerance: only the sums of gains are rounded, to float64.

    Args:
        problem: the units, their costs and the budget.
        gain: what each unit gains from the raise (KL saved), in any unit of measurement; may be negative.

    Raises:
        HalfbyteError: not one gain per unit, a gain is not finite, or the costs are so odd (no common divisor, gains
            almost in proportion) that more than ``SUMS_LIMIT`` sums would have to be kept.
    """
    _one_per_unit(problem, gain, "gain")
    if not all(math.isfinite(value) for value in gain):
        raise HalfbyteError("gain is not finite", where="knapsack", fix="look at the sensitivities")
    low, high = problem.choices[0], problem.choices[-1]
    room = (problem.capacity - low * problem.total_cost) // (high - low)  # multiply-accumulates that may be raised
    useful = [unit for unit in range(problem.size) if gain[unit] > 0 and problem.costs[unit] <= room]
    useful.sort(key=lambda unit: (-gain[unit] / problem.costs[unit], unit))
    raised = _knapsack([problem.costs[unit] for unit in useful], [float(gain[unit]) for unit in useful], room)
    bits = [low] * problem.size
    for item in raised:
        bits[useful[item]] = high
    return tuple(bits)


def _knapsack(costs: Sequence[int], gains: Sequence[float], room: int) -> list[int]:
    """Items with the largest sum of gains whose costs sum to ``room`` at most; items come by falling gain per cost.

    Dynamic programming over the sums that no cheaper sum beats: Nemhauser and Ullmann, "Discrete dynamic programming
    and capital allocation", Management Science 15, 1969. A sum is dropped when the items left, if the last one could be
    had in part (Dantzig's bound), do not lift it to the best sum that taking them in order has reached so far.
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


def _one_per_unit(problem: Problem, values: Sequence[object], name: str) -> None:
    if len(values) != problem.size:
        raise HalfbyteError("one value per unit is needed", where=name, expected=problem.size, got=len(values))
    if any(value != value for value in values):  # only NaN differs from itself
        raise HalfbyteError("value is NaN", where=name, fix="look at the sensitivities")
