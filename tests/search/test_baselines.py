from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.baselines import all_choice, knapsack_genome, random_genome, rule_genome
from halfbyte.search.problem import Problem

QWEN_7B_BLOCK = (3584 * 4608, 3584 * 3584, 2 * 3584 * 18944, 3584 * 18944)


def gain_of(genome, gain) -> float:
    return sum(g for bits, g in zip(genome, gain, strict=True) if bits == 8)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(-1, 4)), min_size=1, max_size=9),
    st.floats(0.5, 1.0),
)
def test_knapsack_equals_brute_force(units, budget):
    costs, gain = zip(*units, strict=True)
    problem = Problem(costs, budget)
    genome = knapsack_genome(problem, gain)
    best = max(gain_of(g, gain) for g in itertools.product((4, 8), repeat=len(costs)) if problem.feasible(g))
    assert problem.feasible(genome)
    assert gain_of(genome, gain) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [0.55, 0.75, 0.9])
def test_knapsack_equals_integer_programming_on_a_7b(seed, budget):
    rng = np.random.default_rng(seed)
    problem = Problem(QWEN_7B_BLOCK * 28, budget)
    gain = np.exp(rng.normal(0, 1, problem.size)) * np.sqrt(problem.costs)
    gain /= gain.sum()
    room = (problem.capacity - 4 * problem.total_cost) / 4
    relaxed = milp(
        -gain * 1e4,
        integrality=np.ones(problem.size),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array([problem.costs]) / 2**20, -np.inf, room / 2**20),
        options={"mip_rel_gap": 0.0},
    )
    genome = knapsack_genome(problem, gain.tolist())
    assert problem.feasible(genome)
    assert gain_of(genome, gain) == pytest.approx(-relaxed.fun / 1e4, rel=1e-9)


def test_knapsack_beats_greedy_where_greedy_is_wrong():
    problem = Problem((6, 5, 5), (4 * 16 + 4 * 10) / (8 * 16))  # room to raise 10
    gain = (7.0, 5.0, 5.0)  # greedy takes the first and has no room for another
    assert knapsack_genome(problem, gain) == (4, 8, 8)


def test_knapsack_leaves_units_that_gain_nothing():
    assert knapsack_genome(Problem((1, 1, 1), 1.0), (1.0, 0.0, -1.0)) == (8, 4, 4)
    assert knapsack_genome(Problem((1, 1), 1.0), (-1.0, -2.0)) == (4, 4)


@pytest.mark.parametrize(("budget", "bits"), [(0.5, 4), (1.0, 8)])
def test_knapsack_at_the_ends_of_the_budget(budget, bits):
    assert knapsack_genome(Problem(QWEN_7B_BLOCK, budget), (1.0, 2.0, 3.0, 4.0)) == (bits,) * 4


def test_knapsack_with_equal_gains_is_exact_and_quick():
    genome = knapsack_genome(Problem((3,) * 500, 0.75), (0.1,) * 500)
    assert genome.count(8) == 250


@pytest.mark.parametrize("gain", [(1.0,), (1.0, float("nan")), (1.0, float("inf"))])
def test_knapsack_refuses_wrong_gains(gain):
    with pytest.raises(HalfbyteError, match=r"one value per unit|NaN|not finite"):
        knapsack_genome(Problem((1, 1), 0.75), gain)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.floats(0.5, 1.0), st.integers(0, 99))
def test_random_genomes_are_full(costs, budget, seed):
    problem = Problem(tuple(costs), budget, choices=(4, 5, 8))
    genome = random_genome(problem, np.random.default_rng(seed))
    assert problem.feasible(genome)
    assert problem.fill(genome) == genome
    assert genome == random_genome(problem, np.random.default_rng(seed))


def test_random_genomes_have_no_favourites():
    problem = Problem((1,) * 10, 0.75, priority=tuple(range(10)))
    rng = np.random.default_rng(0)
    share = np.mean([np.array(random_genome(problem, rng)) == 8 for _ in range(1000)], axis=0)
    assert share == pytest.approx(np.full(10, 0.5), abs=0.06)


def test_all_choice():
    problem = Problem((1, 2), 0.5)
    assert all_choice(problem, 8) == (8, 8)
    with pytest.raises(HalfbyteError, match="among the choices"):
        all_choice(problem, 16)


def test_rule_has_its_own_threshold_at_the_edges():
    problem = Problem((1, 1, 1, 1), 0.75)
    edges = (True, False, False, True)
    assert rule_genome(problem, (2.0, 2.0, 3.0, 1.5), edges) == (8, 4, 8, 4)
    assert rule_genome(problem, (2.0, 2.0, 3.0, 1.5), edges, threshold=1.0, edge_threshold=9.0) == (4, 8, 8, 4)
    with pytest.raises(HalfbyteError, match="one value per unit"):
        rule_genome(problem, (2.0,), edges)
    with pytest.raises(HalfbyteError, match="NaN"):
        rule_genome(problem, (2.0, float("nan"), 3.0, 1.5), edges)
