from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.baselines import knapsack_genome, random_genome
from halfbyte.search.evolution import Evolution, EvolutionSettings
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.problem import Problem
from halfbyte.search.surrogate import best_for, fit


def additive(gain):
    """A made-up score table: what is lost where a unit stays at 4."""
    return lambda genome: sum(g for bits, g in zip(genome, gain, strict=True) if bits == 4)


def small(seed: int, *, size: int = 12, equal: bool = False, budget: float = 0.75):
    rng = np.random.default_rng(seed)
    costs = (5,) * size if equal else tuple(rng.integers(1, 20, size).tolist())
    gain = np.exp(rng.normal(0, 1, size))
    priority = tuple((gain * np.exp(rng.normal(0, 0.5, size))).tolist())  # what a noisy measurement would say
    return Problem(costs, budget, priority=priority), gain.tolist()


def start(problem, settings=None, seed=0, seeds=()):
    return GeneticAlgorithm(problem, settings or GeneticSettings(), np.random.default_rng(seed), seeds)


def run(search, score):
    asked = []
    while not search.done:
        genomes = search.ask()
        asked.append(genomes)
        search.tell({genome: score(genome) for genome in genomes})
    return asked


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_finds_the_optimum_of_a_small_table(seed, equal):
    problem, gain = small(seed, equal=equal)
    score = additive(gain)
    search = start(problem, GeneticSettings(generations=60, patience=60), seed)
    run(search, score)
    best = min(score(g) for g in itertools.product((4, 8), repeat=problem.size) if problem.feasible(g))
    assert search.best[1] == pytest.approx(best, abs=1e-12)
    assert problem.feasible(search.best[0])


def test_gets_near_the_optimum_of_a_large_table_and_beats_random():
    rng = np.random.default_rng(3)
    costs = (9, 7, 74, 37) * 28
    gain = (np.exp(rng.normal(0, 1, 112)) * np.sqrt(costs)).tolist()
    problem = Problem(costs, 0.75, priority=tuple(gain))
    score = additive(gain)
    search = start(problem)
    run(search, score)
    optimum = score(knapsack_genome(problem, gain))
    random = np.mean([score(random_genome(problem, rng)) for _ in range(50)])
    assert search.best[1] - optimum < 0.1 * (random - optimum)


def test_never_loses_to_its_seeds():
    problem, gain = small(1)
    optimum = knapsack_genome(problem, gain)
    search = start(problem, GeneticSettings(generations=3), seeds=[optimum, (8,) * problem.size])
    run(search, additive(gain))
    assert search.history[0]["best"] == search.best[1] == pytest.approx(additive(gain)(problem.fill(optimum)))


def test_asks_for_full_genomes_once_each():
    problem, gain = small(2, size=16)
    search = start(problem)
    asked = [genome for generation in run(search, additive(gain)) for genome in generation]
    assert len(asked) == len(set(asked)) == len(search.scores) == search.history[-1]["evaluations"]
    assert all(problem.feasible(genome) and problem.fill(genome) == genome for genome in asked)
    assert len(asked) <= 30 + 25 * 28


def test_ask_repeats_itself_until_told():
    problem, gain = small(0)
    search = start(problem)
    assert search.ask() == search.ask()
    run(search, additive(gain))
    with pytest.raises(HalfbyteError, match="finished"):
        search.ask()


def test_same_seed_same_search_other_seed_other_search():
    problem, gain = small(0, size=20)
    runs = [run(start(problem, seed=seed), additive(gain)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("asked_first", [False, True])
def test_a_resumed_search_goes_on_bit_for_bit(asked_first):
    problem, gain = small(4, size=24)
    settings = GeneticSettings(population=12, generations=10)
    score = additive(gain)
    whole = start(problem, settings, seed=7, seeds=[(8,) * 24])
    asked = run(whole, score)
    for stop in range(len(asked)):
        part = start(problem, settings, seed=7, seeds=[(8,) * 24])
        for _ in range(stop):
            part.tell({genome: score(genome) for genome in part.ask()})
        if asked_first:
            part.ask()
        resumed = GeneticAlgorithm.from_state(problem, settings, json.loads(json.dumps(part.state())))
        assert run(resumed, score) == asked[stop:]
        assert resumed.history == whole.history
        assert resumed.best == whole.best
        assert resumed.state() == whole.state()


def test_a_finished_search_resumes_as_finished_and_can_be_extended():
    problem, gain = small(4, size=24)
    settings = GeneticSettings(population=12, generations=4)
    search = start(problem, settings)
    run(search, additive(gain))
    state = json.loads(json.dumps(search.state()))
    assert GeneticAlgorithm.from_state(problem, settings, state).stop_reason == "generations"
    longer = GeneticAlgorithm.from_state(problem, GeneticSettings(population=12, generations=6), state)
    run(longer, additive(gain))
    direct = start(problem, GeneticSettings(population=12, generations=6))
    run(direct, additive(gain))
    assert longer.history == direct.history


def test_from_state_refuses_another_search():
    problem, _ = small(0)
    settings = GeneticSettings()
    state = start(problem).state()
    other = Problem(problem.costs, 0.6, priority=problem.priority)
    with pytest.raises(HalfbyteError, match="other budget"):
        GeneticAlgorithm.from_state(other, settings, state)
    with pytest.raises(HalfbyteError, match="other population"):
        GeneticAlgorithm.from_state(problem, GeneticSettings(population=10), state)
    for wrong in ({}, [], {"version": 0}):
        with pytest.raises(HalfbyteError, match="not readable"):
            GeneticAlgorithm.from_state(problem, settings, wrong)  # type: ignore[arg-type]
    for damage in ({"rng": {"bit_generator": "seed"}}, {"scores": [[[4], 1.0]]}, {"population": 3}):
        with pytest.raises(HalfbyteError, match=r"damaged|wrong length"):
            GeneticAlgorithm.from_state(problem, settings, state | damage)


def test_stops_when_nothing_improves():
    problem = Problem((1,) * 40, 0.75)
    search = start(problem, GeneticSettings(patience=3))
    run(search, lambda genome: 1.0)
    assert search.stop_reason == "converged"
    assert search.generation == 3
    assert search.best[0] == min(search.scores)  # ties: the genome that sorts first


def test_improvements_within_the_tolerance_are_ties():
    problem = Problem((1,) * 40, 0.75)
    search = start(problem, GeneticSettings(patience=3, tolerance=0.01, generations=9))
    scores = itertools.count(1, -1e-5)
    run(search, lambda genome: next(scores))
    assert (search.stop_reason, search.generation) == ("converged", 3)
    patient = start(problem, GeneticSettings(patience=3, tolerance=0.0, generations=9))
    run(patient, lambda genome: next(scores))
    assert (patient.stop_reason, patient.generation) == ("generations", 9)


def test_small_steps_add_up_to_an_improvement():
    problem = Problem((1,) * 40, 0.75)
    search = start(problem, GeneticSettings(patience=3, tolerance=0.5, generations=12))
    run(search, lambda genome: -0.3 * (search.generation + 1))  # above the tolerance every second generation
    assert search.stop_reason == "generations"


@pytest.mark.parametrize(("budget", "bits"), [(0.5, 4), (1.0, 8)])
def test_one_legal_genome_is_scored_once(budget, bits):
    search = start(Problem((3, 1, 4) * 30, budget), seeds=[(8,) * 90])
    assert run(search, lambda genome: 0.5) == [[(bits,) * 90]]
    assert search.stop_reason == "exhausted"
    assert search.best == ((bits,) * 90, 0.5)
    assert search.history[-1]["diversity"] == 0.0


@pytest.mark.parametrize("population", [4, 30])
def test_a_small_space_is_searched_whole(population):
    problem = Problem((1,) * 6, 0.75)  # 20 full genomes
    search = start(problem, GeneticSettings(population=population, generations=40, patience=40))
    run(search, additive([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert search.stop_reason == "exhausted"
    assert len(search.scores) == 20
    assert search.best == ((4, 4, 4, 8, 8, 8), 6.0)


def test_more_than_two_choices():
    problem = Problem((2, 3, 4, 5), 0.75, choices=(3, 4, 6, 8))

    def score(genome):
        return sum(w * 4.0**-b for w, b in zip((1, 9, 2, 5), genome, strict=True))

    search = start(problem, GeneticSettings(generations=100, patience=100))
    run(search, score)
    best = min(score(g) for g in itertools.product(problem.choices, repeat=4) if problem.feasible(g))
    assert search.best[1] == pytest.approx(best)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused_and_changes_nothing(bad):
    problem, gain = small(0)
    search, twin = start(problem), start(problem)
    genomes = search.ask()
    with pytest.raises(HalfbyteError, match="not finite"):
        search.tell(dict.fromkeys(genomes[:-1], 1.0) | {genomes[-1]: bad})
    assert not search.scores
    assert run(search, additive(gain)) == run(twin, additive(gain))


def test_scores_for_other_genomes_are_refused():
    problem, _ = small(0)
    search = start(problem)
    genomes = search.ask()
    for wrong in (genomes[:-1], [*genomes, (4,) * problem.size]):
        with pytest.raises(HalfbyteError, match="asked for"):
            search.tell(dict.fromkeys(wrong, 1.0))


def test_mutation_favours_sensitive_units():
    size = 40
    problem = Problem((1,) * size, 0.75, priority=tuple(range(size)))
    search = start(problem)
    rng = np.random.default_rng(0)
    children = [search._mutate(random_genome(problem, rng), strength=4) for _ in range(400)]
    share = np.mean(np.array(children) == 8, axis=0)
    assert share[-10:].mean() > share[:10].mean() + 0.05


def test_a_population_of_two_still_has_children():
    problem, gain = small(0)
    search = start(problem, GeneticSettings(population=2, generations=5))
    run(search, additive(gain))
    assert search.history[-1]["evaluations"] > 2


def test_history_tells_the_story():
    problem, gain = small(5, size=30)
    search = start(problem)
    run(search, additive(gain))
    rows = search.history
    assert [row["generation"] for row in rows] == list(range(len(rows)))
    assert all(later["best"] <= earlier["best"] for earlier, later in itertools.pairwise(rows))
    assert all(row["best"] <= row["mean"] and row["std"] >= 0 and 0 <= row["diversity"] <= 1 for row in rows)
    assert rows[0]["diversity"] == pytest.approx(0.5, abs=0.05)  # random halves differ in half of their units
    assert rows[-1]["diversity"] < rows[0]["diversity"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"population": 1},
        {"generations": -1},
        {"elite": 0},
        {"tournament": 0},
        {"crossover_rate": 1.5},
        {"mutation_rate": 0.9},
        {"patience": 0},
        {"tolerance": float("nan")},
        {"model_share": 1.1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(HalfbyteError, match=f"genetic {next(iter(wrong))}"):
        GeneticSettings(**wrong)


def test_wrong_seeds_and_generators_are_refused():
    problem, _ = small(0)
    with pytest.raises(HalfbyteError, match="wrong length"):
        start(problem, seeds=[(4, 8)])
    with pytest.raises(HalfbyteError, match="cannot be saved"):
        GeneticAlgorithm(problem, GeneticSettings(), np.random.Generator(np.random.MT19937(0)))
    with pytest.raises(HalfbyteError, match="nothing is scored"):
        _ = start(problem).best


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_children_comes_from_the_model(share, monkeypatch):
    problem, gain = small(3, size=40, budget=0.6)
    search = start(problem, GeneticSettings(model_share=share, elite=2, population=12))
    score = additive(gain)
    search.tell({genome: score(genome) for genome in search.ask()})
    expected = best_for(problem, fit(problem, search.scores).mean)
    monkeypatch.setattr(search, "_child", lambda ranked: pytest.fail("bred") if share == 1.0 else search.best[0])
    genomes = search._candidates = search._breed()
    assert len(genomes) == 12
    assert share == 0.0 or genomes[2] == expected
    assert sum(genome not in search.scores for genome in genomes) >= round(10 * share)


def test_more_than_two_choices_have_no_model(monkeypatch):
    monkeypatch.setattr("halfbyte.search.genetic.proposals", lambda *_: pytest.fail("model"))
    search = start(Problem((2, 3, 4, 5) * 4, 0.75, choices=(3, 4, 6, 8)), GeneticSettings(generations=2))
    run(search, lambda genome: sum(4.0**-b for b in genome))


def test_shares_of_the_text_survive_a_resume_and_matter():
    problem, gain = small(4, size=24)
    settings = GeneticSettings(population=12, generations=6)
    score = additive(gain)

    def partial(genomes):
        return {genome: 0.25 for genome in genomes if hash(genome) % 2}

    def go(search, generations, shares):
        for _ in range(generations):
            genomes = search.ask()
            search.tell(
                {genome: score(genome) + 0.5 * (genome in shares(genomes)) for genome in genomes}, shares(genomes)
            )
        return search

    whole = go(start(problem, settings), 5, partial)
    assert whole.shares
    assert set(whole.shares.values()) == {0.25}
    state = json.loads(json.dumps(go(start(problem, settings), 2, partial).state()))
    assert go(GeneticAlgorithm.from_state(problem, settings, state), 3, partial).state() == whole.state()
    search = start(problem, settings)
    genomes = search.ask()
    scores = {genome: score(genome) for genome in genomes}
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(HalfbyteError, match="share of the text"):
            search.tell(scores, {genomes[0]: wrong})
    search.tell(scores, dict.fromkeys(genomes, 1.0))
    assert not search.shares


class Landscape:
    """Losses of a made-up model whose units interact: a power of a sum with terms for pairs, inside blocks and between.

    A pair's term is of the size of the root of its units' own, times a normal number.
    """

    def __init__(self, seed: int, blocks: int = 16, pairs: float = 0.3, power: float = 1.5) -> None:
        rng = np.random.default_rng(seed)
        self.costs, size = (9, 7, 74, 37) * blocks, 4 * blocks
        self.own = rng.lognormal(size=size) * np.sqrt(self.costs)
        self.own /= self.own.sum()
        block = np.arange(size) // 4
        strength = np.where(block[:, None] == block, pairs, pairs / np.sqrt(size))
        self.pairs = np.triu(strength * rng.normal(size=(size, size)) * np.sqrt(np.outer(self.own, self.own)), 1)
        self.power = power

    def __call__(self, genome) -> float:
        low = (np.array(genome) == 4).astype(float)
        return float(max(0.2 + self.own @ low + low @ self.pairs @ low, 0.01) ** self.power)

    def problem(self, budget: float) -> Problem:
        high = (8,) * len(self.costs)
        gains = [self((*high[:unit], 4, *high[unit + 1 :])) - self(high) for unit in range(len(high))]
        return Problem(self.costs, budget, priority=tuple(gains))


def test_the_model_beats_the_knapsack_breeding_alone_and_evolution():
    gained = []  # per landscape: relative to the knapsack, what each search gained in as many evaluations
    for seed in range(4):
        landscape = Landscape(seed)
        problem = landscape.problem(0.6)
        knapsack = problem.fill(knapsack_genome(problem, problem.priority))  # type: ignore[arg-type]
        searches = [
            GeneticAlgorithm(problem, GeneticSettings(generations=8), np.random.default_rng(seed), [knapsack]),
            GeneticAlgorithm(
                problem, GeneticSettings(generations=9, model_share=0.0), np.random.default_rng(seed), [knapsack]
            ),
            Evolution(problem, EvolutionSettings(generations=11), np.random.default_rng(seed), [knapsack]),
        ]
        for search in searches:
            run(search, landscape)
        evaluations = len(searches[0].scores)
        assert all(len(search.scores) >= evaluations for search in searches)
        bests = [min(list(search.scores.values())[:evaluations]) for search in searches]
        gained.append([1 - best / landscape(knapsack) for best in bests])
    model, breeding, evolution = np.mean(gained, axis=0)
    assert model > 0.02
    assert model > 1.2 * max(breeding, evolution)
