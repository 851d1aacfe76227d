from __future__ import annotations

import math

import numpy as np
import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.baselines import knapsack_genome
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.problem import Problem
from halfbyte.search.racing import ANCHORS, ELIMINATION_Z, STAGES, choose, paired_difference, race
from halfbyte.search.surrogate import finalists

WINDOWS, SEGMENTS = 8, 8


class Table:
    """``measure`` from a table of losses ``[windows, segments]`` per genome, counting what is asked."""

    def __init__(self, losses):
        self.losses = losses
        self.asked = []

    def __call__(self, genomes, windows):
        self.asked += [(genome, window) for genome in genomes for window in windows]
        return np.stack([self.losses[genome][windows.start : windows.stop] for genome in genomes])

    def used(self, *free):
        return sum(genome not in free for genome, _ in self.asked)


def genome(number: int) -> tuple[int, ...]:
    return tuple(8 if number >> bit & 1 else 4 for bit in range(10))


def table(offsets, seed=0, noise=0.05):
    rng = np.random.default_rng(seed)
    difficulty = rng.lognormal(0, 0.5, (WINDOWS, SEGMENTS))
    return Table(
        {
            genome(number): difficulty + offset + noise * rng.normal(size=(WINDOWS, SEGMENTS))
            for number, offset in enumerate(offsets)
        }
    )


def test_a_hopeless_candidate_is_dropped_and_a_better_one_measured_whole():
    measure = table([0.0, 0.5, -0.5])
    raced = race([genome(1), genome(2)], genome(0), measure)
    assert list(raced) == [genome(1), genome(2)]
    bad, good = raced.values()
    assert (bad.windows, bad.complete) == (2, False)
    assert (good.windows, good.complete) == (8, True)
    assert good.score == measure.losses[genome(2)].mean()
    assert bad.score == pytest.approx(measure.losses[genome(1)].mean(), abs=0.05)  # difficulty cancels: sd 0.06 else
    assert measure.used(genome(0)) == 2 + 8


def test_no_window_is_measured_twice():
    measure = table(np.linspace(-0.1, 0.1, 9))
    race([genome(n) for n in range(1, 9)] * 2, genome(0), measure)
    assert len(measure.asked) == len(set(measure.asked))


def test_the_estimate_is_the_incumbents_mean_plus_the_paired_difference():
    measure = table([0.0, 0.5])
    raced = race([genome(1)], genome(0), measure)[genome(1)]
    first, second = measure.losses[genome(0)], measure.losses[genome(1)]
    assert raced.score == pytest.approx(first.mean() + (second[:2] - first[:2]).mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("incumbent", [None, genome(0)])
def test_the_best_genome_is_always_a_complete_one(seed, incumbent):
    measure = table(np.random.default_rng(seed).normal(0, 0.02, 30), seed, noise=0.2)
    raced = race([genome(n) for n in range(1, 30)], incumbent, measure, z=0.0)
    best = min(raced, key=lambda g: (raced[g].score, g))
    reference = math.inf if incumbent is None else float(measure.losses[incumbent].mean())
    assert raced[best].complete or raced[best].score > reference
    assert all(raced[g].complete == (raced[g].windows == 8) for g in raced)


def test_without_an_incumbent_the_best_of_the_first_stage_is_one():
    measure = table([0.5, 0.3, 0.0, 0.6], noise=0.01)
    raced = race([genome(n) for n in range(4)], None, measure)
    assert [r.windows for r in raced.values()] == [2, 2, 8, 2]
    assert measure.used() == 3 * 2 + 8
    assert race([], None, measure) == {}


def test_twins_of_the_incumbent_go_all_the_way():
    losses = table([0.0]).losses[genome(0)]
    measure = Table({genome(0): losses, genome(1): losses})
    assert race([genome(1)], genome(0), measure)[genome(1)].complete


def test_an_incumbent_among_the_candidates_keeps_its_score():
    measure = table([0.0, 0.4])
    raced = race([genome(0), genome(1)], genome(0), measure)
    assert raced[genome(0)].complete
    assert raced[genome(0)].score == measure.losses[genome(0)].mean()


def test_anchors_take_the_noise_out_of_the_yardstick():
    """The same difference to the incumbent, estimated with its own noise in it and without."""
    errors = []
    for seed in range(40):
        measure = table([0.0] * 25 + [0.5], seed, noise=0.3)
        incumbent, candidate = genome(0), genome(25)
        anchors = [genome(n) for n in range(25)]
        scores = [race([candidate], incumbent, measure, anchors=a)[candidate].score for a in ([], anchors)]
        errors.append([score - measure.losses[candidate].mean() for score in scores])
    alone, anchored = np.std(errors, axis=0)
    assert anchored < 0.85 * alone  # a quarter of the text: sqrt(3/4) of a difference of two, or of one


def test_anchors_do_not_move_the_incumbents_level():
    measure = table([0.0, 0.5, 0.2, 0.3], noise=0.0)
    raced = race([genome(1)], genome(0), measure, anchors=[genome(2), genome(3), genome(2)])[genome(1)]
    assert not raced.complete
    assert raced.score == pytest.approx(measure.losses[genome(1)].mean())
    assert measure.used(genome(0), genome(2), genome(3)) == 2


def test_a_score_does_not_depend_on_the_company():
    measure = table(np.random.default_rng(1).normal(0, 0.05, 20))
    together = race([genome(n) for n in range(1, 20)], genome(0), measure)
    for number in range(1, 20):
        assert race([genome(number)], genome(0), measure)[genome(number)] == together[genome(number)]


def test_an_infinite_z_measures_everything_and_nan_is_never_dropped():
    measure = table([0.0, 5.0])
    assert race([genome(1)], genome(0), measure, z=math.inf)[genome(1)].complete
    measure.losses[genome(1)][:] = np.nan
    raced = race([genome(1)], genome(0), measure)[genome(1)]
    assert raced.complete
    assert math.isnan(raced.score)


def test_one_value_says_nothing_of_its_error():
    measure = Table({genome(0): np.ones((2, 1)), genome(1): np.full((2, 1), 9.0)})
    assert race([genome(1)], genome(0), measure, stages=(1, 2))[genome(1)].complete


@pytest.mark.parametrize("stages", [(), (0, 2), (4, 2), (2, 2)])
def test_wrong_stages_are_refused(stages):
    with pytest.raises(HalfbyteError, match="stages"):
        race([genome(1)], genome(0), table([0, 0]), stages=stages)


def test_the_error_is_over_segments_or_over_windows_where_that_is_larger():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 64))
    assert paired_difference(a, b)[1] == pytest.approx((a - b).std(ddof=1) / math.sqrt(128))
    drift = np.arange(8.0)[:, None] + np.zeros((8, 64))  # windows differ, segments inside them do not
    mean, error = paired_difference(drift, np.zeros((8, 64)))
    assert mean == 3.5
    assert error == pytest.approx(drift[:, 0].std(ddof=1) / math.sqrt(8))
    with pytest.raises(HalfbyteError, match="same segments"):
        paired_difference(a, b[:1])


def arrays(means, seed=0, noise=0.02, windows=8):
    rng = np.random.default_rng(seed)
    difficulty = rng.lognormal(0, 0.3, (windows, SEGMENTS))
    exact = rng.normal(size=(len(means), windows, SEGMENTS))
    exact -= exact.mean(axis=(1, 2), keepdims=True)  # the means are what the test says
    return {genome(n): difficulty + mean + noise * exact[n] for n, mean in enumerate(means)}


def test_the_lowest_validation_mean_wins_unless_noise_hides_it():
    clear = choose(arrays([0.2, 0.1, 0.3]), arrays([0.1, 0.2, 0.0], seed=1))
    assert clear.winner == clear.leader == genome(1)
    assert clear.ties == (genome(1),)
    assert clear.differences[genome(1)] == (0.0, 0.0)
    assert clear.differences[genome(0)][0] == pytest.approx(0.1)
    assert 0 < clear.noise_floor < 0.1


def test_ties_go_by_both_texts_together():
    choice = choose(arrays([0.1, 0.1001, 0.3]), arrays([0.2, 0.1, 0.0], seed=1))
    assert choice.leader == genome(0)
    assert choice.ties == (genome(0), genome(1))
    assert choice.winner == genome(1)  # genome 2 is best on the search text, but validation rules it out
    strict = choose(arrays([0.1, 0.1001]), arrays([0.2, 0.1], seed=1), z=0.0)
    assert strict.winner == genome(0)


def test_a_preferred_finalist_wins_a_tie_but_not_a_race():
    validation, search = arrays([0.1, 0.1001, 0.3]), arrays([0.1, 0.2, 0.0], seed=1)
    assert choose(validation, search).winner == genome(0)
    assert choose(validation, search, prefer=[genome(2), genome(1)]).winner == genome(1)


def test_texts_count_by_their_length():
    choice = choose(arrays([0.1, 0.1001]), arrays([0.1001, 0.1], seed=1, windows=4), z=9.0)
    assert choice.winner == genome(0)
    longer = choose(arrays([0.1, 0.1001], windows=4), arrays([0.1001, 0.1], seed=1), z=9.0)
    assert longer.winner == genome(1)


def test_one_finalist_wins_and_none_is_an_error():
    only = choose(arrays([0.1]), arrays([0.1]))
    assert (only.winner, only.ties, only.noise_floor) == (genome(0), (genome(0),), 0.0)
    for wrong in ({}, arrays([0.1, 0.2])):
        with pytest.raises(HalfbyteError, match="both texts"):
            choose(wrong, arrays([0.1]))


class Text:
    """Losses per segment of made-up genomes, in 8 windows of 512 tokens, segments of 64.

    A token's loss is its difficulty × (a base + what the units at 4 add to it) × what rounding happens to make of it
    for this genome, all lognormal. Pairs of units interact. ``true`` is the mean over texts without end.
    """

    WINDOWS, TOKENS, SEGMENT = 8, 4096, 64

    def __init__(self, seed: int, blocks: int = 10, rounding: float = 0.4) -> None:
        rng = np.random.default_rng(seed)
        self.costs, size, self.rounding = (9, 7, 74, 37) * blocks, 4 * blocks, rounding
        own = rng.lognormal(size=size) * np.sqrt(self.costs)
        self.own = own / own.sum()
        self.pairs = np.triu(0.15 * rng.normal(size=(size, size)) * np.sqrt(np.outer(self.own, self.own)), 1)
        self.difficulty = rng.lognormal(-0.5, 1.0, self.TOKENS)
        self.added = self._segments(self.own[:, None] * rng.lognormal(-0.5, 1.0, (size, self.TOKENS)) * self.difficulty)
        self.hardness = self._segments(self.difficulty)
        self.known: dict[tuple[int, ...], np.ndarray] = {}
        self.read: set[tuple[tuple[int, ...], int]] = set()

    def _segments(self, tokens: np.ndarray) -> np.ndarray:
        return tokens.reshape(*tokens.shape[:-1], -1, self.SEGMENT).mean(axis=-1)

    def true(self, genome) -> float:
        low = (np.array(genome) == 4).astype(float)
        return float(0.2 + self.own @ low + low @ self.pairs @ low)

    def _losses(self, genome) -> np.ndarray:
        if genome not in self.known:
            low = (np.array(genome) == 4).astype(float)
            mean = (0.2 + low @ self.pairs @ low) * self.hardness + low @ self.added
            rng = np.random.default_rng([bits // 4 for bits in genome])
            rounded = rng.lognormal(-(self.rounding**2) / 2, self.rounding, self.TOKENS) * self.difficulty
            self.known[genome] = (mean * self._segments(rounded) / self.hardness).reshape(self.WINDOWS, -1)
        return self.known[genome]

    def __call__(self, genomes, windows) -> np.ndarray:
        self.read |= {(genome, window) for genome in genomes for window in windows}
        return np.stack([self._losses(genome)[windows.start : windows.stop] for genome in genomes])

    def search(self, stages, z=ELIMINATION_Z) -> tuple[float, float]:
        """True loss of what a search finds, relative to the knapsack it starts from; and the share of tokens read."""
        size = len(self.costs)
        high = (8,) * size
        singles = [(*high[:unit], 4, *high[unit + 1 :]) for unit in range(size)]
        gains = [float(self._losses(single).mean() - self._losses(high).mean()) for single in singles]
        problem = Problem(self.costs, 0.6, priority=tuple(gains))
        knapsack = problem.fill(knapsack_genome(problem, gains))
        search = GeneticAlgorithm(problem, GeneticSettings(generations=12), np.random.default_rng(0), [knapsack])
        self.read.clear()
        while not search.done:
            incumbent = search.best[0] if search.history else None
            raced = race(search.ask(), incumbent, self, stages, z, search.complete[-ANCHORS:])
            search.tell(
                {genome: found.score for genome, found in raced.items()},
                {genome: found.windows / self.WINDOWS for genome, found in raced.items()},
            )
        best = finalists(problem, search.scores, 1, search.shares)[0]
        return self.true(best) / self.true(knapsack) - 1, len(self.read) / (self.WINDOWS * len(search.scores))


def test_stages_read_two_fifths_of_the_tokens_and_find_as_good_a_genome():
    whole, staged = (np.array([Text(seed).search(stages) for seed in range(5)]) for stages in ((Text.WINDOWS,), STAGES))
    assert (whole[:, 1] == 1.0).all()
    assert staged[:, 1].mean() <= 0.40
    assert whole[:, 0].mean() < -0.03  # there is something to win over the knapsack
    assert staged[:, 0].mean() < whole[:, 0].mean() + 0.005
