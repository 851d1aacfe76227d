"""Searches and the surrogate on menus of made-up models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.baselines import random_genome
from halfbyte.search.evolution import Evolution, EvolutionSettings
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.menu import Menu
from halfbyte.search.problem import Problem
from halfbyte.search.surrogate import best_for, finalists, fit, proposals
from tests.search.made_up_menus import is_full, menu_of, model_menu
from tests.search.test_genetic import run


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


def evolved(menu, seed, generations, unit):
    """A search whose scores are predicted losses, rounded so that they are the same in each unit."""
    search = GeneticAlgorithm(
        menu, GeneticSettings(generations=generations, population=10, model_share=0.0), np.random.default_rng(seed)
    )
    run(search, lambda genome: round(menu.predicted(genome) / unit, 9))
    return search


def searches(menu, seed, seeds, generations=10):
    yield GeneticAlgorithm(menu, GeneticSettings(generations=generations), np.random.default_rng(seed), seeds)
    yield Evolution(menu, EvolutionSettings(generations=generations), np.random.default_rng(seed), seeds)


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
