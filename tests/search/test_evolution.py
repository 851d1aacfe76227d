from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.baselines import knapsack_genome
from halfbyte.search.evolution import Evolution, EvolutionSettings
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.problem import Problem
from tests.search.test_genetic import run


def additive(gain):
    """A made-up score table: what is lost where a unit stays at 4."""
    return lambda genome: sum(g for bits, g in zip(genome, gain, strict=True) if bits == 4)


def small(seed: int, *, size: int = 12):
    rng = np.random.default_rng(seed)
    gain = np.exp(rng.normal(0, 1, size))
    priority = tuple((gain * np.exp(rng.normal(0, 0.5, size))).tolist())
    return Problem(tuple(rng.integers(1, 20, size).tolist()), 0.75, priority=priority), gain.tolist()


def start(problem, settings=None, seed=0, seeds=()):
    return Evolution(problem, settings or EvolutionSettings(), np.random.default_rng(seed), seeds)


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_optimum_of_a_small_table(seed):
    problem, gain = small(seed)
    score = additive(gain)
    search = start(problem, EvolutionSettings(generations=60, patience=60), seed)
    run(search, score)
    best = min(score(g) for g in itertools.product((4, 8), repeat=problem.size) if problem.feasible(g))
    assert search.best[1] == pytest.approx(best, abs=1e-12)


def test_starts_from_its_seeds_and_never_loses_to_them():
    problem, gain = small(1, size=30)
    seeds = [knapsack_genome(problem, problem.priority), (8,) * 30]  # type: ignore[arg-type]
    search = start(problem, seeds=seeds)
    score = additive(gain)
    assert search.ask() == [problem.fill(problem.repair(seed)) for seed in seeds]
    run(search, score)
    assert search.history[0]["evaluations"] == 2
    assert search.best[1] <= search.history[0]["best"] == min(score(problem.fill(problem.repair(s))) for s in seeds)


def test_asks_for_unscored_full_genomes_near_the_parent():
    problem, gain = small(2, size=40)
    search = start(problem, EvolutionSettings(swaps=1.0, offspring=10))
    score = additive(gain)
    search.tell({genome: score(genome) for genome in search.ask()})
    parent = search.best[0]
    assert search.population == [parent]
    children = search.ask()
    assert len(children) == len(set(children)) == 10
    assert all(problem.feasible(child) and problem.fill(child) == child for child in children)
    assert all(child not in search.scores for child in children)
    changed = np.count_nonzero(np.array(children) != np.array(parent), axis=1)
    assert changed.min() >= 2
    assert np.median(changed) <= 6


def test_more_swaps_change_more():
    problem, gain = small(2, size=40)
    changes = []
    for swaps in (1.0, 6.0):
        search = start(problem, EvolutionSettings(swaps=swaps))
        search.tell({genome: additive(gain)(genome) for genome in search.ask()})
        changes.append(np.count_nonzero(np.array(search.ask()) != np.array(search.best[0])))
    assert changes[1] > 1.5 * changes[0]


@pytest.mark.parametrize("asked_first", [False, True])
def test_a_resumed_search_goes_on_bit_for_bit(asked_first):
    problem, gain = small(4, size=24)
    settings = EvolutionSettings(offspring=8, generations=6)
    score = additive(gain)
    whole = start(problem, settings, seed=7)
    asked = run(whole, score)
    for stop in range(len(asked)):
        part = start(problem, settings, seed=7)
        for _ in range(stop):
            part.tell({genome: score(genome) for genome in part.ask()})
        if asked_first:
            part.ask()
        resumed = Evolution.from_state(problem, settings, json.loads(json.dumps(part.state())))
        assert run(resumed, score) == asked[stop:]
        assert resumed.state() == whole.state()


def test_a_state_of_another_algorithm_is_refused():
    problem, _ = small(0)
    with pytest.raises(HalfbyteError, match="other algorithm"):
        GeneticAlgorithm.from_state(problem, GeneticSettings(), start(problem).state())


def test_a_small_space_is_searched_whole():
    problem = Problem((1,) * 6, 0.75)  # 20 full genomes
    search = start(problem, EvolutionSettings(offspring=4, generations=40, patience=40))
    run(search, additive([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert search.stop_reason == "exhausted"
    assert len(search.scores) == 20
    assert search.best == ((4, 4, 4, 8, 8, 8), 6.0)


@pytest.mark.parametrize(("budget", "bits"), [(0.5, 4), (1.0, 8)])
def test_one_legal_genome_is_scored_once(budget, bits):
    search = start(Problem((3, 1, 4) * 30, budget))
    assert run(search, lambda genome: 0.5) == [[(bits,) * 90]]
    assert search.stop_reason == "exhausted"


def test_more_than_two_choices():
    problem = Problem((2, 3, 4, 5), 0.75, choices=(3, 4, 6, 8))

    def score(genome):
        return sum(w * 4.0**-b for w, b in zip((1, 9, 2, 5), genome, strict=True))

    search = start(problem, EvolutionSettings(generations=100, patience=100))
    run(search, score)
    best = min(score(g) for g in itertools.product(problem.choices, repeat=4) if problem.feasible(g))
    assert search.best[1] == pytest.approx(best)


@pytest.mark.parametrize("wrong", [{"offspring": 0}, {"swaps": 0.5}, {"patience": 0}, {"generations": -1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(HalfbyteError, match=f"evolution {next(iter(wrong))}"):
        EvolutionSettings(**wrong)
