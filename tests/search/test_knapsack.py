"""The knapsack over menus: exact, and the quick one beside it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from halfbyte.core.errors import HalfbyteError
from tests.search.made_up_menus import everything, is_full, menu_of, menus, model_menu


def highs(menu, weights, gap=0.0) -> float:
    """The least Σ weight · loss by integer programming."""
    rows = [(unit, gene) for unit, costs in enumerate(menu.costs) for gene in range(len(costs))]
    loss = np.array([weights[unit] * menu.losses[unit][gene] for unit, gene in rows])
    cost = np.array([menu.costs[unit][gene] for unit, gene in rows])
    scale = 1e3 / max(float(weights @ menu.features([menu.solve(weights)])[0]), 1e-300)
    units = np.array(rows)[:, 0]
    solved = milp(
        loss * scale,
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(csr_array((np.ones(len(rows)), (units, np.arange(len(rows))))), 1, 1),
            LinearConstraint(cost[None, :] / max(menu.capacity, 1), -np.inf, 1.0),
        ],
        options={"mip_rel_gap": gap},
    )
    return float(solved.fun) / scale


@given(menus(), st.integers(0, 99))
@settings(max_examples=150)
def test_knapsack_equals_brute_force(menu, seed):
    weights = np.random.default_rng(seed).uniform(0.1, 3, menu.size)
    genome = menu.knapsack(weights)
    best = min(float(menu.features([g])[0] @ weights) for g in everything(menu) if menu.feasible(g))
    assert is_full(menu, genome)
    assert menu.features([genome])[0] @ weights == pytest.approx(best, rel=1e-9, abs=1e-12)
    nearly = menu.solve(weights)
    assert is_full(menu, nearly)
    assert menu.features([nearly])[0] @ weights >= best - 1e-9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.03, 0.4, 0.8])
def test_knapsack_equals_integer_programming(seed, share):
    menu = model_menu(seed, blocks=12, share=share, scale=1e-7)
    weights = np.random.default_rng(seed).lognormal(0, 0.6, menu.size)
    found = menu.features([menu.knapsack(weights), menu.solve(weights)]) @ weights
    assert found[0] == pytest.approx(highs(menu, weights), rel=1e-7)
    assert 1.0 <= found[1] / found[0] < 1.03


def test_the_quick_knapsack_is_near_the_exact_one_and_quick():
    gaps = []
    for seed in range(12):
        menu = model_menu(seed, share=0.05 + 0.07 * seed)
        weights = np.random.default_rng(seed).lognormal(0, 0.6, menu.size)
        quick, exact = menu.features([menu.solve(weights), menu.knapsack(weights)]) @ weights
        gaps.append(quick / exact - 1)
    assert np.mean(gaps) < 0.002
    assert min(gaps) >= -1e-12
    menu = model_menu(0)
    started = time.process_time()
    for _ in range(20):
        menu.solve(np.ones(menu.size))
    assert (time.process_time() - started) / 20 < 0.02  # about 1 ms on an idle machine


def test_knapsack_without_weights_minimises_the_predicted_loss():
    menu = model_menu(3, blocks=4)
    assert menu.knapsack() == menu.knapsack(np.full(menu.size, 7.0))
    assert menu.predicted(menu.knapsack()) == pytest.approx(highs(menu, np.ones(menu.size)), rel=1e-7)
    assert menu.predicted(menu.knapsack()) <= menu.predicted(menu.fill(menu.repair(menu.tops.tolist())))


def test_tensors_all_alike_are_no_trouble():
    menu = menu_of([[3, 5, 9, 14]] * 300, [[8.0, 4.0, 1.0, 0.0]] * 300, 300 * 7)
    assert menu.predicted(menu.knapsack()) == pytest.approx(highs(menu, np.ones(300)), rel=1e-9)


def test_negative_and_zero_weights_count_as_small_ones():
    menu = model_menu(1, blocks=3)
    weights = np.ones(menu.size)
    weights[:5] = (-9.0, -1e-3, 0.0, 1e-9, -1.0)
    for genome in (menu.solve(weights), menu.knapsack(weights)):
        assert is_full(menu, genome)
        assert np.mean(genome[:5]) < 1.5 < np.mean(genome[5:])
    assert menu.solve(np.zeros(menu.size)) == menu.solve(np.ones(menu.size))
    assert is_full(menu, menu.solve(-np.ones(menu.size)))
    for wrong, said in (([1.0], "one value per unit"), ([float("nan")] * menu.size, "NaN"), ([np.inf] * 22, "finite")):
        for method in (menu.solve, menu.knapsack):
            with pytest.raises(HalfbyteError, match=said):
                method(np.array(wrong))
