from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from halfbyte.core.errors import HalfbyteError
from halfbyte.search import problem as problem_module
from halfbyte.search.problem import Problem, pruned, random_genome
from halfbyte.search.sensitivity import activation_problem

QWEN_7B_BLOCK = (3584 * 4608, 3584 * 3584, 2 * 3584 * 18944, 3584 * 18944)
BITS = (2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5)  # per weight, of ggml types


def problem_of(costs, losses, budget) -> Problem:
    return Problem(tuple(map(tuple, costs)), tuple(map(tuple, losses)), budget)


@st.composite
def problems(draw, max_units=4, max_formats=4) -> Problem:
    """Small menus; budgets from the least that is legal to more than anything costs."""
    costs, losses = [], []
    step = draw(st.sampled_from([1, 1, 6]))
    for _ in range(draw(st.integers(1, max_units))):
        count = draw(st.integers(1, max_formats))
        costs.append(sorted(step * cost for cost in draw(st.sets(st.integers(0, 40), min_size=count, max_size=count))))
        losses.append(sorted(draw(st.lists(st.floats(0, 9), min_size=count, max_size=count)), reverse=True))
    least, most = (sum(menu[end] for menu in costs) for end in (0, -1))
    return problem_of(costs, losses, draw(st.integers(least, most + 5)))


def everything(problem):
    return itertools.product(*(range(len(menu)) for menu in problem.costs))


def is_full(problem, genome) -> bool:
    raised = (
        (*genome[:unit], choice + 1, *genome[unit + 1 :])
        for unit, choice in enumerate(genome)
        if choice < problem.tops[unit]
    )
    return problem.feasible(genome) and not any(problem.feasible(more) for more in raised)


def model_problem(seed: int, units: int, share: float = 0.4) -> Problem:
    """Matrices of a made-up model: losses fall about fourfold per bit; ``share`` of what can be spent."""
    rng = np.random.default_rng(seed)
    sizes = 2048 * rng.integers(4, 64, units)
    costs = (np.outer(sizes, BITS) / 8).astype(int)
    losses = rng.lognormal(0, 1, units)[:, None] * np.sqrt(sizes)[:, None] * 4.0 ** -np.array(BITS)
    least, most = costs[:, 0].sum(), costs[:, -1].sum()
    return problem_of(costs, losses, int(least + share * (most - least)))


@given(problems(), st.none() | st.integers(0, 99), st.data())
def test_repair_and_fill_keep_to_the_budget_and_use_it(problem, seed, data):
    genome = tuple(data.draw(st.integers(0, len(menu) - 1)) for menu in problem.costs)

    def rng():
        return None if seed is None else np.random.default_rng(seed)

    repaired = problem.repair(genome, rng())
    assert problem.feasible(repaired)
    assert all(after <= before for after, before in zip(repaired, genome, strict=True))
    assert problem.repair(repaired, rng()) == repaired
    filled = problem.fill(repaired, rng())
    assert is_full(problem, filled)
    assert all(after >= before for after, before in zip(filled, repaired, strict=True))
    assert (repaired, filled) == (problem.repair(genome, rng()), problem.fill(repaired, rng()))
    if problem.feasible(genome):
        assert repaired == genome
    else:
        assert problem.fill(genome, rng()) == genome


@given(problems())
@settings(max_examples=200)
def test_the_knapsack_equals_brute_force(problem):
    genome = problem.knapsack()
    best = min(problem.predicted(other) for other in everything(problem) if problem.feasible(other))
    assert is_full(problem, genome)
    assert problem.predicted(genome) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_the_knapsack_beats_greedy_where_greedy_is_wrong():
    problem = problem_of([(0, 6), (0, 5), (0, 5)], [(7, 0), (5, 0), (5, 0)], 10)
    assert problem.fill(problem.cheapest) == (1, 0, 0)
    assert problem.knapsack() == (0, 1, 1)


def test_the_knapsack_of_other_losses_is_filled_by_them():
    problem = problem_of([(0, 3), (0, 3), (0, 2)], [(9, 0), (1, 0), (1, 0)], 5)
    assert problem.knapsack() == (1, 0, 1)
    assert problem.with_losses([(1, 0), (9, 0), (1, 0)]).knapsack() == (0, 1, 1)
    with pytest.raises(HalfbyteError, match="unit 1: losses must not be negative, nor rise"):
        problem.with_losses([(1, 0), (0, 9), (1, 0)]).knapsack()


def by_integer_programming(problem) -> float:
    """The least predicted loss."""
    rows = [(unit, choice) for unit, menu in enumerate(problem.costs) for choice in range(len(menu))]
    cost = np.array([problem.costs[unit][choice] for unit, choice in rows])
    loss = np.array([problem.losses[unit][choice] for unit, choice in rows])
    one_each = csr_array((np.ones(len(rows)), (np.array(rows)[:, 0], np.arange(len(rows)))))
    solved = milp(
        loss,
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None] / problem.budget, -np.inf, 1.0)],
        options={"mip_rel_gap": 0.0},
    )
    return float(solved.fun)


@pytest.mark.parametrize("share", [0.03, 0.4, 0.9])
def test_the_knapsack_of_a_model_equals_integer_programming(share):
    problem = model_problem(1, 60, share)
    assert problem.predicted(problem.knapsack()) == pytest.approx(by_integer_programming(problem), rel=1e-7)


@pytest.mark.parametrize("budget", [0.55, 0.75, 0.9])
def test_the_knapsack_of_activation_bits_equals_integer_programming(budget):
    gains = np.exp(np.random.default_rng(0).normal(0, 1, 56)) * np.sqrt(QWEN_7B_BLOCK * 14) / 1e4
    problem = activation_problem(QWEN_7B_BLOCK * 14, budget, gains)
    assert problem.predicted(problem.knapsack()) == pytest.approx(by_integer_programming(problem), rel=1e-7)


def test_too_many_budgets_are_rounded_but_kept_to(monkeypatch):
    exact = model_problem(2, 40)
    best = exact.knapsack()
    monkeypatch.setattr(problem_module, "STATES_LIMIT", 4000)
    rounded = exact.knapsack()
    assert rounded != best  # else the limit was not felt
    assert is_full(exact, rounded)
    margin = exact.with_budget(exact.budget - exact.budget * exact.size // 4000)
    monkeypatch.undo()
    assert exact.predicted(best) <= exact.predicted(rounded) <= exact.predicted(margin.knapsack())


def test_a_step_that_saves_more_than_the_one_before_is_found():
    # From 30 to 50 saves little, from 50 to 90 much: half of the units at 90 and none at 50 is best.
    problem = problem_of([(30, 50, 90)] * 300, [(8.0, 7.5, 1.0)] * 300, 300 * 60)
    assert problem.predicted(problem.knapsack()) == 150 * 8.0 + 150 * 1.0


def test_the_least_loss_per_cost_goes_first_and_the_most_is_saved_first():
    problem = problem_of([(0, 10), (0, 10), (0, 40)], [(1, 0), (3, 0), (8, 0)], 30)  # per cost 0.1, 0.3, 0.2
    assert problem.repair((1, 1, 1)) == (0, 1, 0)
    assert problem.fill((0, 0, 0)) == (1, 1, 0)  # the third does not fit
    assert problem.rank.tolist() == [0.0, 1.0, 0.5]


def test_rank_shares_ties_and_knows_menus_without_a_choice():
    tied = problem_of([(1, 2), (1, 3), (4,)], [(5, 0), (10, 0), (7,)], 99)
    assert tied.rank.tolist() == [0.75, 0.75, 0.0]
    assert problem_of([(1, 2)], [(1, 0)], 1).rank.tolist() == [0.5]


def test_random_repair_prefers_small_losses_but_not_always():
    problem = problem_of([(0, 1)] * 10, [(2.0**unit, 0) for unit in range(10)], 5)
    rng = np.random.default_rng(0)
    kept = np.mean([problem.repair((1,) * 10, rng) for _ in range(400)], axis=0)
    assert kept[:3].mean() < 0.1
    assert kept[-3:].mean() > 0.9
    assert 0.05 < kept[4] < kept[5] < 0.95


def test_what_a_genome_costs_and_loses():
    problem = problem_of([(1, 4, 9), (2, 3)], [(5, 2, 0.5), (1, 0.25)], 11)
    assert (problem.size, problem.tops.tolist(), problem.cheapest, problem.dearest) == (2, [2, 1], (0, 0), (2, 1))
    assert problem.steps.tolist() == [[3, 5, 0], [1, 0, 0]]
    assert (problem.spent((2, 0)), problem.spent((2, 1)), problem.predicted((1, 1))) == (11, 12, 2.25)
    assert problem.feasible((2, 0))
    assert not problem.feasible((2, 1))
    assert problem.with_budget(12).feasible((2, 1))
    assert problem.with_losses([(3, 2, 1), (1, 0)]).predicted((0, 0)) == 4


def test_more_than_enough_leaves_one_genome_and_so_does_the_least():
    menus = [(1, 2), (3, 4, 5), (6,)], [(1, 0), (2, 1, 0), (1,)]
    plenty, least = problem_of(*menus, 99), problem_of(*menus, 10)
    assert plenty.knapsack() == plenty.fill((0, 0, 0)) == (1, 2, 0)
    assert least.knapsack() == least.repair((1, 2, 0)) == (0, 0, 0)


def test_numpy_numbers_become_plain():
    problem = Problem(np.array([[1, 2], [2, 4]]), np.array([[1, 0], [3, 1]]), np.int64(5))  # type: ignore[arg-type]
    assert {type(cost) for menu in problem.costs for cost in menu} == {int}
    assert {type(loss) for menu in problem.losses for loss in menu} == {float}
    assert type(problem.budget) is int
    for genome in (problem.check(np.array([1, 0])), problem.knapsack(), problem.fill((0, 0)), problem.repair((1, 1))):
        assert {type(choice) for choice in genome} == {int}


@pytest.mark.parametrize(
    ("costs", "losses", "budget", "said"),
    [
        ((), (), 1, "no units"),
        (((1, 2),), (), 9, "losses of 1 units, got 0"),
        (((1, 2), ()), ((1, 0), ()), 9, "unit 1: expected ascending costs"),
        (((2, 2),), ((1, 0),), 9, "unit 0: expected ascending costs"),
        (((-1, 2),), ((1, 0),), 9, "unit 0: expected ascending costs"),
        (((1, 2),), ((1,),), 9, "unit 0: expected one loss per format, 2, got 1"),
        (((1, 2),), ((math.nan, 0),), 9, "not finite"),
        (((1, 2),), ((math.inf, 0),), 9, "not finite"),
        (((1, 2),), ((1, 2),), 9, "nor rise"),
        (((1, 2),), ((1, -0.1),), 9, "negative"),
        (((1, 2),), ((1, 0),), math.nan, "budget: too small"),
        (((10, 20), (5, 7)), ((1, 0), (1, 0)), 14, r"expected 15 \(all.*cheapest\) to 27, got 14"),
    ],
)
def test_wrong_problems_are_refused(costs, losses, budget, said):
    with pytest.raises(HalfbyteError, match=said):
        Problem(costs, losses, budget)


@pytest.mark.parametrize("method", ["check", "spent", "feasible", "predicted", "repair", "fill"])
@pytest.mark.parametrize(
    ("genome", "said"),
    [((0,), "wrong length"), ((0, 2), "unit 1: no such format, expected 0 to 1"), ((-1, 0), "unit 0")],
)
def test_wrong_genomes_are_refused(method, genome, said):
    with pytest.raises(HalfbyteError, match=said):
        getattr(problem_of([(1, 4, 9), (2, 3)], [(5, 2, 0.5), (1, 0.25)], 11), method)(genome)


@pytest.mark.parametrize(("budget", "choice"), [(0.5, 0), (1.0, 1)])
def test_the_ends_of_the_activation_budget_leave_one_genome(budget, choice):
    problem = activation_problem(QWEN_7B_BLOCK * 28, budget, [1.0] * 112)
    assert problem.knapsack() == problem.fill(problem.repair((1,) * 112)) == (choice,) * 112
    assert problem.spent((choice,) * 112) == 8 * budget * sum(QWEN_7B_BLOCK) * 28


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_pruned_menus_are_menus_and_miss_nothing(formats):
    costs, losses = zip(*formats, strict=True)
    kept = pruned(costs, losses)
    problem_of([[costs[index] for index in kept]], [[losses[index] for index in kept]], 9)
    for index in set(range(len(costs))) - set(kept):
        assert any(costs[k] <= costs[index] and losses[k] <= losses[index] for k in kept)


def test_pruned_drops_what_another_format_beats():
    assert pruned([9, 3, 5, 5, 7, 3], [0.1, 4.0, 2.0, 2.0, 2.5, 5.0]) == [1, 2, 0]
    for wrong, said in (([1.0], "expected 2 values"), ([math.nan, 1.0], "NaN")):
        with pytest.raises(HalfbyteError, match=said):
            pruned([1, 2], wrong)


@given(problems(max_units=8), st.integers(0, 99))
def test_random_genomes_are_full(problem, seed):
    genome = random_genome(problem, np.random.default_rng(seed))
    assert is_full(problem, genome)
    assert genome == random_genome(problem, np.random.default_rng(seed))


def test_random_genomes_have_no_favourites():
    problem = activation_problem((1,) * 10, 0.75, range(10))
    rng = np.random.default_rng(0)
    share = np.mean([random_genome(problem, rng) for _ in range(1000)], axis=0)
    assert share == pytest.approx(np.full(10, 0.5), abs=0.06)
