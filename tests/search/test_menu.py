"""Menus: what they refuse, repair, fill and enumerate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.baselines import random_genome
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.menu import Menu, pruned
from tests.search.made_up_menus import everything, is_full, menu_of, menus, model_menu
from tests.search.test_genetic import run


@given(menus(), st.integers(0, 99), st.booleans(), st.data())
def test_repair_and_fill_keep_to_the_budget_and_use_it(menu, seed, random, data):
    genome = tuple(data.draw(st.integers(0, len(costs) - 1)) for costs in menu.costs)

    def rng():
        return np.random.default_rng(seed) if random else None

    repaired = menu.repair(genome, rng())
    assert menu.feasible(repaired)
    assert all(after <= before for after, before in zip(repaired, genome, strict=True))
    assert menu.repair(repaired, rng()) == repaired
    filled = menu.fill(repaired, rng())
    assert is_full(menu, filled)
    assert all(after >= before for after, before in zip(filled, repaired, strict=True))
    assert menu.fill(filled, rng()) == filled
    assert (repaired, filled) == (menu.repair(genome, rng()), menu.fill(repaired, rng()))
    assert all(type(gene) is int for gene in (*repaired, *filled))
    if not menu.feasible(genome):
        assert menu.fill(genome, rng()) == genome


def test_the_cheapest_loss_goes_first_and_the_dearest_is_saved_first():
    menu = menu_of([[0, 10], [0, 10], [0, 40]], [[1.0, 0.0], [3.0, 0.0], [8.0, 0.0]], 30)  # per byte 0.1, 0.3, 0.2
    assert menu.repair((1, 1, 1)) == (0, 1, 0)
    assert menu.fill((0, 0, 0)) == (1, 1, 0)  # the third does not fit
    assert menu.rank.tolist() == [0.0, 1.0, 0.5]
    assert menu_of([[1, 2]], [[1.0, 0.0]], 1).rank.tolist() == [0.5]


def test_random_repair_prefers_cheap_losses_but_not_always():
    losses = [[2.0**unit, 0.0] for unit in range(10)]
    menu = menu_of([[0, 1]] * 10, losses, 5)
    rng = np.random.default_rng(0)
    kept = np.mean([menu.repair((1,) * 10, rng) for _ in range(400)], axis=0)
    assert kept[:3].mean() < 0.1
    assert kept[-3:].mean() > 0.9
    assert 0.05 < kept[4] < kept[5] < 0.95


@given(menus(max_units=3))
def test_space_is_every_full_genome(menu):
    assert menu.space(100) == tuple(genome for genome in everything(menu) if is_full(menu, genome))


def test_space_gives_up_beyond_its_limit():
    assert model_menu(0).space(1000) is None


def test_levels_are_genes_and_features_are_losses():
    menu = menu_of([[1, 4, 9], [2, 3]], [[5.0, 2.0, 0.5], [1.0, 0.25]], 11)
    assert menu.of_levels(menu.levels((2, 0))) == (2, 0)
    assert menu.tops.tolist() == [2, 1]
    assert menu.raise_costs.tolist() == [[3, 5, 0], [1, 0, 0]]
    assert menu.features([(0, 1), (2, 0)]).tolist() == [[5.0, 0.25], [0.5, 1.0]]
    assert menu.features([]).shape == (0, 2)
    assert (menu.spent((2, 0)), menu.spent((2, 1)), menu.predicted((0, 0))) == (11, 12, 6.0)
    assert menu.feasible((2, 0)) > menu.feasible((2, 1))
    assert menu.check([np.int64(2), np.int64(1)]) == (2, 1)  # type: ignore[list-item]
    for wrong, said in (((0,), "wrong length"), ((0, 2), "unit 1: gene.*expected 0 to 1"), ((-1, 0), "unit 0")):
        with pytest.raises(HalfbyteError, match=said):
            menu.check(wrong)
    assert all(type(value) is int for value in (*Menu(np.array([[1, 2]]), np.zeros((1, 2)), 2).costs[0],))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("costs", "losses", "capacity", "said"),
    [
        ((), (), 1, "no units"),
        (((1, 2),), (), 9, "one menu of losses per unit"),
        (((1, 2), ()), ((1, 0), ()), 9, "unit 1: costs must be bytes"),
        (((2, 2),), ((1, 0),), 9, "unit 0: costs must be bytes"),
        (((1, 2),), ((1.0,),), 9, "unit 0: one loss per choice"),
        (((1, 2),), ((float("nan"), 0.0),), 9, "not finite"),
        (((1, 2),), ((float("inf"), 0.0),), 9, "not finite"),
        (((1, 2),), ((1.0, 2.0),), 9, "nor rise"),
        (((1, 2),), ((1.0, -0.1),), 9, "negative"),
        (((1, 2),), ((1.0, 0.0),), float("nan"), "capacity is not finite"),
        (((10, 20), (5, 7)), ((1, 0), (1, 0)), 14, "at least 15 bytes.*take 27.*got 14 bytes"),
    ],
)
def test_wrong_menus_are_refused(costs, losses, capacity, said):
    with pytest.raises(HalfbyteError, match=said):
        Menu(costs, losses, capacity)


def test_more_than_enough_capacity_leaves_one_genome():
    menu = menu_of([[1, 2], [3, 4, 5], [6]], [[1, 0], [2, 1, 0], [1]], 99)
    assert menu.space(9) == ((1, 2, 0),)
    assert menu.solve(np.ones(3)) == menu.knapsack() == menu.fill((0, 0, 0)) == (1, 2, 0)
    search = GeneticAlgorithm(menu, GeneticSettings(), np.random.default_rng(0))
    assert run(search, lambda genome: 1.0) == [[(1, 2, 0)]]
    least = menu_of([[1, 2], [3, 4, 5], [6]], [[1, 0], [2, 1, 0], [1]], 10)
    assert least.solve(np.ones(3)) == least.knapsack() == least.repair((1, 2, 0)) == (0, 0, 0)


def test_pruned_drops_what_another_choice_beats():
    assert pruned([9, 3, 5, 5, 7, 3], [0.1, 4.0, 2.0, 2.0, 2.5, 5.0]) == [1, 2, 0]
    assert pruned([], []) == []
    for wrong, said in (([1.0], "one value per unit"), ([float("nan"), 1.0], "NaN")):
        with pytest.raises(HalfbyteError, match=said):
            pruned([1, 2], wrong)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_pruned_menus_are_menus(choices):
    costs, losses = zip(*choices, strict=True)
    kept = pruned(costs, losses)
    Menu((tuple(costs[place] for place in kept),), (tuple(losses[place] for place in kept),), 9)
    for place in set(range(len(costs))) - set(kept):
        assert any(costs[k] <= costs[place] and losses[k] <= losses[place] for k in kept)


def test_random_genomes_are_full():
    menu, rng = model_menu(0, blocks=3), np.random.default_rng(0)
    assert all(is_full(menu, random_genome(menu, rng)) for _ in range(20))
