from __future__ import annotations

import itertools
import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from halfbyte.errors import HalfbyteError
from halfbyte.search.baselines import random_genome
from halfbyte.search.evolution import Evolution, EvolutionSettings
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.menu import Menu, pruned
from halfbyte.search.problem import Problem
from halfbyte.search.surrogate import best_for, finalists, fit, proposals
from tests.search.test_genetic import run

BITS = np.array([2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5])  # per weight
TENSORS = (2**22, 2**20, 2**20, 2**22, 2**24, 2**24, 2**24)  # weights of one block's tensors


def model_menu(seed: int, blocks: int = 30, share: float = 0.4, scale: float = 1.0) -> Menu:
    """Seven tensors per block and a head; losses fall about fourfold per bit; ``share`` of what can be spent."""
    rng = np.random.default_rng(seed)
    sizes = np.array([*TENSORS * blocks, 2**26])
    costs = (np.outer(sizes, BITS) / 8).astype(int)
    own = rng.lognormal(0, 1.2, sizes.size) * np.sqrt(sizes)
    losses = own[:, None] * 4.0 ** -(BITS - BITS[0]) * rng.lognormal(0, 0.2, (sizes.size, BITS.size))
    losses = scale * np.minimum.accumulate(losses / own.sum(), axis=1)
    least, most = int(costs[:, 0].sum()), int(costs[:, -1].sum())
    return menu_of(costs.tolist(), losses.tolist(), int(least + share * (most - least)))


def menu_of(costs, losses, capacity) -> Menu:
    return Menu(tuple(map(tuple, costs)), tuple(map(tuple, losses)), capacity)


@st.composite
def menus(draw, max_units=4, max_choices=4):
    costs, losses = [], []
    for _ in range(draw(st.integers(1, max_units))):
        count = draw(st.integers(1, max_choices))
        costs.append(sorted(draw(st.sets(st.integers(0, 40), min_size=count, max_size=count))))
        losses.append(sorted(draw(st.lists(st.integers(0, 30), min_size=count, max_size=count)), reverse=True))
    least, most = sum(c[0] for c in costs), sum(c[-1] for c in costs)
    return menu_of(costs, losses, draw(st.integers(least, most + 5)))


def everything(menu):
    return itertools.product(*(range(len(costs)) for costs in menu.costs))


def raised_by_one(menu, genome):
    for unit, gene in enumerate(genome):
        if gene + 1 < len(menu.costs[unit]):
            yield (*genome[:unit], gene + 1, *genome[unit + 1 :])


def is_full(menu, genome) -> bool:
    return menu.feasible(genome) and not any(menu.feasible(more) for more in raised_by_one(menu, genome))


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


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e9])
def test_the_unit_of_losses_and_weights_does_not_matter(scale):
    menu, same = model_menu(5, blocks=6, scale=2.0**-3), model_menu(5, blocks=6, scale=scale)
    weights = np.random.default_rng(0).normal(0.7, 0.6, menu.size)
    assert menu.rank == pytest.approx(same.rank)
    for other in (weights, 1e-9 * weights, 1e200 * weights):
        assert menu.solve(weights) == same.solve(other)
        assert menu.knapsack(weights) == same.knapsack(other)
    top = menu.of_levels(menu.tops)
    assert menu.repair(top) == same.repair(top)
    assert menu.fill((0,) * menu.size) == same.fill((0,) * menu.size)
    searches = [evolved(problem, seed=3, generations=4, unit=unit) for problem, unit in ((menu, 0.125), (same, scale))]
    assert list(searches[0].scores) == list(searches[1].scores)


def evolved(menu, seed, generations, unit):
    """A search whose scores are predicted losses, rounded so that they are the same in each unit."""
    search = GeneticAlgorithm(
        menu, GeneticSettings(generations=generations, population=10, model_share=0.0), np.random.default_rng(seed)
    )
    run(search, lambda genome: round(menu.predicted(genome) / unit, 9))
    return search


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


class Truth:
    """What a made-up model loses: each predicted loss times a factor of its own, and terms for pairs of units."""

    def __init__(self, menu: Menu, seed: int, noise: float = 0.0) -> None:
        rng = np.random.default_rng(1000 + seed)
        self.menu, self.noise, self.rng = menu, noise, rng
        self.factors = rng.lognormal(0, 0.5, menu.size)
        strength = 0.3 / np.sqrt(menu.size)
        self.pairs = np.triu(strength * rng.normal(size=(menu.size, menu.size)), 1)

    def exact(self, genome) -> float:
        own = self.factors * self.menu.features([genome])[0]
        return float(max(own.sum() + np.sqrt(own) @ self.pairs @ np.sqrt(own), 0.0))

    def __call__(self, genome) -> float:
        return self.exact(genome) * (1 + self.noise * float(self.rng.normal()))


def test_scores_teach_the_surrogate_each_units_factor():
    menu = model_menu(0, blocks=3, scale=1e-6)
    factors = np.random.default_rng(1).lognormal(0, 0.5, menu.size)
    rng = np.random.default_rng(2)
    genomes = [random_genome(menu, rng) for _ in range(400)]
    scores = {genome: 3e-5 + float(menu.features([genome])[0] @ factors) for genome in genomes}
    model = fit(menu, scores)
    share = menu.features(genomes).std(axis=0)
    assert np.average(np.abs(model.mean / factors - 1), weights=share) < 0.02
    assert model.base == pytest.approx(3e-5, rel=0.02)
    prior = fit(menu, {})
    assert prior.mean == pytest.approx(np.ones(menu.size))
    assert best_for(menu, prior.mean) == menu.solve(np.ones(menu.size))
    optimum, found, before = (menu.features([menu.solve(w)])[0] @ factors for w in (factors, model.mean, prior.mean))
    assert found - optimum < 0.1 * (before - optimum)


def test_proposals_and_finalists():
    menu = model_menu(2, blocks=4)
    truth = Truth(menu, 2, noise=0.01)
    rng = np.random.default_rng(0)
    scores = {genome: truth(genome) for genome in (random_genome(menu, rng) for _ in range(60))}
    found = proposals(menu, scores, 14, np.random.default_rng(0))
    assert found[0] == best_for(menu, fit(menu, scores).mean)
    assert len(found) == len(set(found)) == 14
    assert not set(found) & set(scores)
    assert all(is_full(menu, genome) for genome in found)
    best = finalists(menu, scores, 5)
    assert best[0] == found[0]
    assert min(scores, key=lambda g: scores[g]) in best[:3]
    assert truth.exact(best[0]) < min(map(truth.exact, scores))


def searches(menu, seed, seeds, generations=10):
    yield GeneticAlgorithm(menu, GeneticSettings(generations=generations), np.random.default_rng(seed), seeds)
    yield Evolution(menu, EvolutionSettings(generations=generations), np.random.default_rng(seed), seeds)


def test_searches_beat_the_knapsack_over_predictions():
    gained = []
    for seed in range(3):
        menu = model_menu(seed, blocks=10, share=0.35)
        knapsack, truth = menu.knapsack(), Truth(menu, seed, noise=0.005)
        row = []
        for search in searches(menu, seed, [knapsack]):
            asked = [genome for generation in run(search, truth) for genome in generation]
            assert all(is_full(menu, genome) for genome in asked)
            assert len(asked) == len(set(asked))
            ends = search.best[0], finalists(menu, search.scores, 1)[0]
            row += [1 - truth.exact(genome) / truth.exact(knapsack) for genome in ends]
        gained.append(row)
    genetic, model, evolution, _ = np.mean(gained, axis=0)
    assert min(genetic, model) > 0.02
    assert evolution > 0.0
    assert genetic > evolution


@pytest.mark.parametrize("asked_first", [False, True])
def test_a_resumed_search_goes_on_bit_for_bit(asked_first):
    menu = model_menu(1, blocks=3)
    truth = Truth(menu, 1).exact
    settings = (GeneticSettings(population=8, generations=5), EvolutionSettings(offspring=8, generations=5))
    algorithms: tuple[Any, Any] = (GeneticAlgorithm, Evolution)
    for algorithm, how in zip(algorithms, settings, strict=True):
        whole = algorithm(menu, how, np.random.default_rng(7), [menu.knapsack()])
        asked = run(whole, truth)
        for stop in range(len(asked)):
            part = algorithm(menu, how, np.random.default_rng(7), [menu.knapsack()])
            for _ in range(stop):
                part.tell({genome: truth(genome) for genome in part.ask()})
            if asked_first:
                part.ask()
            resumed = algorithm.from_state(menu, how, json.loads(json.dumps(part.state())))
            assert run(resumed, truth) == asked[stop:]
            assert resumed.state() == whole.state()


def test_from_state_refuses_another_menu():
    menu, settings = model_menu(1, blocks=2), GeneticSettings(population=6)
    state = json.loads(json.dumps(GeneticAlgorithm(menu, settings, np.random.default_rng(0)).state()))
    assert state["identity"]["costs"] == [list(costs) for costs in menu.costs]
    for other, name in (
        (Menu(menu.costs, menu.losses, menu.capacity - 1), "capacity"),
        (Menu(menu.costs, (tuple(2 * loss for loss in menu.losses[0]), *menu.losses[1:]), menu.capacity), "losses"),
        (Problem((1,) * menu.size, 0.75), "costs, budget"),
    ):
        with pytest.raises(HalfbyteError, match=f"other {name}"):
            GeneticAlgorithm.from_state(other, settings, state)


def test_units_with_one_choice_stay_where_they_are():
    menu = menu_of([[5], [1, 2, 3], [7], [1, 4]], [[1.0], [2, 1, 0], [0.5], [3, 0]], 18)
    for search in searches(menu, 0, [], generations=30):
        run(search, menu.predicted)
        assert search.best[0] == menu.knapsack()
        assert all((genome[0], genome[2]) == (0, 0) for genome in search.scores)


def test_the_search_of_menus_sees_numbers_not_torch():
    import halfbyte.search.knapsack
    import halfbyte.search.menu
    import halfbyte.search.space

    for module in (halfbyte.search.knapsack, halfbyte.search.menu, halfbyte.search.space):
        assert not hasattr(module, "torch")
