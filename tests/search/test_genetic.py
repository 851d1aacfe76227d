from __future__ import annotations

import itertools
import json
import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.problem import Problem, random_genome
from halfbyte.search.sensitivity import activation_problem
from tests.search.test_problem import everything, is_full, model_problem, problems


class Scorer:
    """Scores by what is predicted, and remembers what it was asked."""

    def __init__(self, problem: Problem, score=None):
        self.score = score or problem.predicted
        self.asked = []
        self.bests = []

    def __call__(self, genomes, best):
        self.asked.append(genomes)
        self.bests.append(best)
        return {genome: self.score(genome) for genome in genomes}


def small(seed: int, size: int = 12) -> Problem:
    """Two formats; losses that the search reads, with noise in what the problem believes."""
    rng = np.random.default_rng(seed)
    return activation_problem(rng.integers(1, 20, size), 0.75, np.exp(rng.normal(0, 1, size)))


def run(problem, score=None, seed=0, starts=(), saved=None, **changed):
    """The result, what was asked, and the states that were saved."""
    scorer, states = Scorer(problem, score), []
    algorithm = GeneticAlgorithm(problem, GeneticSettings(**changed), seed, starts)
    result = algorithm.run(scorer, state=saved, save=states.append)
    return result, scorer, states


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_optimum_of_a_small_problem(seed):
    problem = small(seed)
    found = run(problem, seed=seed, generations=60, patience=60)[0]
    best = min(problem.predicted(genome) for genome in everything(problem) if problem.feasible(genome))
    assert found.scores[found.best] == pytest.approx(best, abs=1e-12)


def test_gets_near_the_optimum_of_a_large_problem_and_beats_random():
    problem, rng = model_problem(3, 60), np.random.default_rng(0)
    found = run(problem)[0]
    optimum = problem.predicted(problem.knapsack())
    random = np.mean([problem.predicted(random_genome(problem, rng)) for _ in range(50)])
    assert found.scores[found.best] - optimum < 0.1 * (random - optimum)


def test_improves_on_a_knapsack_that_knows_nothing_of_interactions():
    gains = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        problem = activation_problem((9, 7, 74, 37) * 8, 0.6, rng.lognormal(size=32))
        own = np.array(problem.losses)[:, 0]
        pairs = np.triu(0.4 * rng.normal(size=(32, 32)) * np.sqrt(np.outer(own, own)), 1)

        def score(genome, own=own, pairs=pairs):
            low = np.array(genome) == 0
            return float(20 + own @ low + low @ pairs @ low)

        knapsack = problem.knapsack()
        found = run(problem, score, starts=[knapsack])[0]
        gains.append(1 - found.scores[found.best] / score(knapsack))
    assert min(gains) > 0.02


def test_never_loses_to_its_starts():
    problem = small(1)
    optimum = problem.knapsack()
    found = run(problem, generations=3, starts=[optimum, problem.dearest])[0]
    assert found.history[0].best == found.scores[found.best] == problem.predicted(optimum)


def test_starts_are_repaired_filled_and_first_and_all_of_them_enter():
    problem = model_problem(0, 20)
    rng = np.random.default_rng(0)
    starts = [problem.dearest, *(random_genome(problem, rng) for _ in range(6))]
    scorer = run(problem, population=4, generations=0, starts=starts)[1]
    assert scorer.asked == [[problem.fill(problem.repair(start)) for start in starts]]


def test_asks_for_full_genomes_once_each():
    problem = model_problem(2, 20)
    found, scorer, _ = run(problem, population=20, generations=10, patience=10)
    asked = [genome for genomes in scorer.asked for genome in genomes]
    assert len(asked) == len(set(asked)) == len(found.scores) == found.history[-1].evaluations == 20 + 10 * 18
    assert list(found.scores) == asked
    assert all(is_full(problem, genome) for genome in asked)


def test_the_scorer_is_told_the_best_so_far():
    problem = small(3, size=30)
    found, scorer, _ = run(problem, generations=6)
    assert scorer.bests[0] is None
    for best, row in zip(scorer.bests[1:], found.history, strict=False):
        assert found.scores[best] == row.best


def test_same_seed_same_search_other_seed_other_search():
    problem = small(0, size=20)
    asked = [run(problem, seed=seed, generations=5)[1].asked for seed in (5, 5, 6)]
    assert asked[0] == asked[1] != asked[2]


@given(problems(max_units=6), st.integers(0, 9), st.data())
@settings(max_examples=25, deadline=None)
def test_a_resumed_search_ends_in_the_same_result(problem, seed, data):
    changed = {"population": 6, "generations": 5, "patience": 4}
    whole, scorer, states = run(problem, seed=seed, **changed)
    at = data.draw(st.integers(0, len(states) - 1))
    resumed, rest, _ = run(problem, seed=seed, saved=json.loads(json.dumps(states[at])), **changed)
    assert resumed == whole
    assert rest.asked == scorer.asked[at + 1 :]


def test_a_large_search_resumes_from_any_generation_with_or_without_json():
    problem = model_problem(4, 30)
    whole, scorer, states = run(problem, starts=[problem.dearest], generations=6)
    for at, state in enumerate(states):
        for saved in (state, json.loads(json.dumps(state))):
            resumed, rest, later = run(problem, saved=saved, generations=6)
            assert resumed == whole
            assert list(resumed.scores) == list(whole.scores)
            assert rest.asked == scorer.asked[at + 1 :]
            assert later == states[at + 1 :]


def test_a_finished_search_can_be_extended():
    problem = model_problem(4, 30)
    states = run(problem, generations=3)[2]
    assert run(problem, generations=6, saved=states[-1])[0] == run(problem, generations=6)[0]


@pytest.mark.parametrize(
    ("problem", "changed", "said"),
    [
        (small(0).with_budget(small(0).budget - 5), {}, "other budget; start afresh without --resume"),
        (small(1), {}, "other costs, losses, budget; start afresh without --resume"),
        (small(0), {"population": 10}, "other population; start afresh without --resume"),
        (small(0), {"mutation_rate": 0.1, "elite": 3}, "other elite, mutation_rate; start afresh without --resume"),
    ],
)
def test_a_state_of_another_search_is_refused(problem, changed, said):
    state = run(small(0), generations=1)[2][0]
    with pytest.raises(HalfbyteError, match=said):
        run(problem, saved=state, **changed)


@pytest.mark.parametrize(
    "damage",
    [
        {"identity": {}},
        {"identity": None},
        {"rng": {"bit_generator": "seed"}},
        {"rng": 3},
        {"scores": [[[0], 1.0]]},
        {"scores": []},
        {"population": 3},
        {"population": []},
        {"population": [[1] * 12]},
        {"history": [{"number": 0}]},
        {"history": []},
        {"stalled": None},
    ],
)
def test_a_damaged_state_is_refused(damage):
    problem = small(0)
    state = run(problem, generations=1)[2][0]
    with pytest.raises(HalfbyteError, match=r"search state: damaged.*start afresh without --resume"):
        run(problem, saved=state | damage)


@pytest.mark.parametrize("state", [{}, [], "state"])
def test_something_else_than_a_state_is_refused(state):
    with pytest.raises(HalfbyteError, match="search state: damaged"):
        run(small(0), saved=state)


def test_stops_when_nothing_improves_and_ties_go_to_the_first_genome():
    found = run(activation_problem((1,) * 40, 0.75, [1.0] * 40), lambda genome: 1.0, patience=3)[0]
    assert (found.stopped, len(found.history)) == ("converged", 4)
    assert found.best == min(found.scores)


def test_an_improvement_renews_patience():
    falling = itertools.count(0, -1)
    found = run(activation_problem((1,) * 40, 0.75, [1.0] * 40), lambda _: next(falling), patience=1, generations=4)[0]
    assert (found.stopped, found.history[-1].number) == ("generations", 4)


@pytest.mark.parametrize(("budget", "choice"), [(0.5, 0), (1.0, 1)])
def test_one_legal_genome_is_scored_once(budget, choice):
    problem = activation_problem((3, 1, 4) * 10, budget, [1.0] * 30)
    found, scorer, _ = run(problem, starts=[problem.dearest])
    assert scorer.asked == [[(choice,) * 30]]
    assert (found.stopped, found.best, found.history[0].diversity) == ("exhausted", (choice,) * 30, 0.0)


@pytest.mark.parametrize("population", [4, 30])
def test_a_small_space_is_searched_whole(population):
    problem = activation_problem((1,) * 6, 0.75, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # 20 full genomes
    found = run(problem, population=population, generations=60, patience=60)[0]
    assert (found.stopped, len(found.scores), found.best) == ("exhausted", 20, (0, 0, 0, 1, 1, 1))


def test_a_population_of_two_still_has_children():
    assert len(run(small(0), population=2, generations=5)[0].scores) == 2 + 5


def test_mutation_gives_more_to_sensitive_units():
    """Scores say nothing, and losses differ too little for repair and fill to care: only the rank speaks."""
    problem = activation_problem((1,) * 40, 0.75, np.linspace(1.0, 1.0001, 40))
    found = run(problem, lambda genome: 1.0, patience=25, mutation_rate=0.3)[0]
    share = np.mean(list(found.scores)[200:], axis=0)
    assert share[-10:].mean() > share[:10].mean() + 0.1


def test_history_tells_the_story():
    problem = small(5, size=30)
    rows = []
    scorer = Scorer(problem)
    found = GeneticAlgorithm(problem).run(scorer, on_generation=rows.append)
    assert rows == found.history
    assert [row.number for row in rows] == list(range(len(rows)))
    assert all(later.best <= earlier.best for earlier, later in itertools.pairwise(rows))
    assert all(row.best <= row.mean and row.std >= 0 and 0 <= row.diversity <= 1 for row in rows)
    assert rows[0].mean == pytest.approx(np.mean([problem.predicted(genome) for genome in scorer.asked[0]]))
    assert rows[0].diversity == pytest.approx(0.5, abs=0.05)  # random halves differ in half of their units
    assert rows[-1].diversity < rows[0].diversity
    assert {type(value) for row in rows for value in astuple(row)} == {int, float}


def test_numpy_scores_become_plain_and_can_be_saved():
    states = run(small(0), lambda genome: np.float32(sum(genome)), generations=1)[2]
    assert json.loads(json.dumps(states[0])) == states[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused_before_it_is_saved(bad):
    scores, states = itertools.chain(range(35), itertools.repeat(bad)), []
    with pytest.raises(HalfbyteError, match=r"23 of 28 genomes: score is not finite.*model overflows; load it in"):
        GeneticAlgorithm(small(0, size=20)).run(
            lambda genomes, _: {genome: float(next(scores)) for genome in genomes}, save=states.append
        )
    assert len(states) == 1


@pytest.mark.parametrize("answer", [lambda genomes: genomes[1:], lambda genomes: [*genomes[1:], (9,) * 12]])
def test_scores_of_other_genomes_are_refused(answer):
    with pytest.raises(HalfbyteError, match="scores: not those of the 30 genomes that were asked for"):
        GeneticAlgorithm(small(0)).run(lambda genomes, _: dict.fromkeys(answer(genomes), 1.0))


def test_a_start_of_another_problem_is_refused():
    with pytest.raises(HalfbyteError, match="wrong length"):
        run(small(0), starts=[(0, 1)])


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
        {"crossover_rate": math.nan},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(HalfbyteError, match=f"genetic {next(iter(wrong))}: out of range"):
        GeneticSettings(**wrong)
