from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.problem import Problem

QWEN_7B_BLOCK = (3584 * 4608, 3584 * 3584, 2 * 3584 * 18944, 3584 * 18944)


@st.composite
def problems(draw, max_size: int = 12) -> Problem:
    bits = draw(st.sampled_from([(4, 8), (4, 6, 8), (3, 4, 8)]))
    size = draw(st.integers(1, max_size))
    costs = draw(st.lists(st.integers(1, 60), min_size=size, max_size=size))
    budget = draw(st.floats(bits[0] / 8, bits[-1] / 8))
    priority = draw(st.none() | st.lists(st.floats(-5, 5), min_size=size, max_size=size).map(tuple))
    return Problem(tuple(costs), budget, bits, priority)


@st.composite
def problems_and_genomes(draw):
    problem = draw(problems())
    bits = st.sampled_from(problem.choices)
    genome = tuple(draw(st.lists(bits, min_size=problem.size, max_size=problem.size)))
    return problem, genome, draw(st.none() | st.integers(0, 99))


def generator(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


def raised_by_one(problem: Problem, genome):
    for unit, bits in enumerate(genome):
        if bits < problem.choices[-1]:
            higher = problem.choices[problem.choices.index(bits) + 1]
            yield (*genome[:unit], higher, *genome[unit + 1 :])


@given(problems_and_genomes())
def test_repair_is_feasible_idempotent_and_only_lowers(case):
    problem, genome, seed = case
    repaired = problem.repair(genome, generator(seed))
    assert problem.feasible(repaired)
    assert problem.repair(repaired, generator(seed)) == repaired
    assert all(after <= before for after, before in zip(repaired, genome, strict=True))
    if problem.feasible(genome):
        assert repaired == genome


@given(problems_and_genomes())
def test_fill_leaves_no_room_is_idempotent_and_only_raises(case):
    problem, genome, seed = case
    filled = problem.fill(genome, generator(seed))
    assert problem.fill(filled, generator(seed)) == filled
    assert all(after >= before for after, before in zip(filled, genome, strict=True))
    if problem.feasible(genome):
        assert problem.feasible(filled)
        assert not any(problem.feasible(more) for more in raised_by_one(problem, filled))
    else:
        assert filled == genome


@given(problems(max_size=5))
@settings(max_examples=60)
def test_space_is_every_full_genome(problem):
    full = [
        genome
        for genome in itertools.product(problem.choices, repeat=problem.size)
        if problem.feasible(genome) and not any(problem.feasible(more) for more in raised_by_one(problem, genome))
    ]
    assert problem.space(limit=3**5) == tuple(full)


def test_space_gives_up_beyond_its_limit():
    assert Problem((1,) * 112, 0.75).space(limit=800) is None
    assert Problem((1,) * 4, 0.75).space(limit=6) is not None
    assert Problem((1,) * 4, 0.75).space(limit=5) is None


@pytest.mark.parametrize(("budget", "bits"), [(0.5, 4), (1.0, 8)])
def test_the_ends_of_the_budget_leave_one_genome(budget, bits):
    problem = Problem(QWEN_7B_BLOCK * 28, budget)
    assert problem.space(limit=800) == ((bits,) * 112,)
    assert problem.fill(problem.repair((8,) * 112)) == (bits,) * 112
    assert problem.fraction((bits,) * 112) == budget


def test_equal_costs_meet_the_budget_exactly():
    problem = Problem((7,) * 112, 0.75)
    genome = problem.repair((8,) * 112)
    assert problem.fraction(genome) == 0.75
    assert genome.count(8) == 56


def test_a_budget_that_is_no_binary_fraction_is_met_exactly():
    problem = Problem((1,) * 10, 0.7)  # 4 of 10 units at 8: (4 * 8 + 6 * 4) / 80
    assert problem.fill((4,) * 10).count(8) == 4
    assert not problem.feasible((8,) * 5 + (4,) * 5)


def test_the_least_priority_per_cost_goes_first():
    problem = Problem((10, 10, 40), 0.75, priority=(1.0, 3.0, 8.0))  # per cost 0.1, 0.3, 0.2
    assert problem.repair((8, 8, 8)) == (4, 8, 4)
    assert problem.fill((4, 4, 4)) == (8, 8, 4)  # the third does not fit any more


def test_without_priority_the_costliest_goes_first_and_then_the_last():
    assert Problem((1, 5, 1), 0.75).repair((8, 8, 8)) == (8, 4, 8)
    assert Problem((1, 1, 1, 1), 0.75).repair((8, 8, 8, 8)) == (8, 8, 4, 4)


def test_random_repair_keeps_sensitive_units_more_often_but_not_always():
    problem = Problem((1,) * 20, 0.75, priority=tuple(range(20)))
    rng = np.random.default_rng(0)
    kept = np.mean([np.array(problem.repair((8,) * 20, rng)) == 8 for _ in range(500)], axis=0)
    assert 0.02 < kept[:5].mean() < 0.35
    assert 0.65 < kept[-5:].mean() < 0.98


def test_rank_shares_ties():
    assert Problem((1, 1, 1), 0.75, priority=(5.0, 1.0, 5.0)).rank.tolist() == [0.75, 0.0, 0.75]
    assert Problem((1, 2), 0.75, priority=(1.0, 2.0)).rank.tolist() == [0.5, 0.5]
    assert Problem((1, 9), 0.75).rank.tolist() == [0.5, 0.5]


def test_numpy_numbers_become_plain_and_do_not_overflow():
    problem = Problem(tuple(np.full(4, 2**60)), 0.75, priority=tuple(np.ones(4)))  # type: ignore[arg-type]
    assert all(type(cost) is int for cost in problem.costs)
    assert problem.fraction(problem.fill((4,) * 4)) == 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.49}, "budget is out of range"),
        ({"budget": 1.01}, "budget is out of range"),
        ({"budget": float("nan")}, "budget is out of range"),
        ({"costs": ()}, "costs must be positive"),
        ({"costs": (1, 0)}, "costs must be positive"),
        ({"choices": (8, 4)}, "ascending"),
        ({"choices": (4, 4)}, "ascending"),
        ({"priority": (1.0,)}, "one priority per unit"),
        ({"priority": (1.0, float("nan"))}, "not finite"),
    ],
)
def test_a_wrong_problem_is_refused(arguments, message):
    with pytest.raises(HalfbyteError, match=message):
        Problem(**{"costs": (1, 1), "budget": 0.75} | arguments)


@pytest.mark.parametrize("method", ["fraction", "feasible", "repair", "fill"])
@pytest.mark.parametrize("genome", [(4,), (4, 4, 4), (4, 5)])
def test_a_wrong_genome_is_refused(method, genome):
    with pytest.raises(HalfbyteError, match=r"wrong length|among the choices"):
        getattr(Problem((1, 1), 0.75), method)(genome)
