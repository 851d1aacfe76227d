from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.validate import choose, paired_difference, two_rungs

WINDOWS, SEGMENTS = 8, 8


class Table:
    """Losses ``[windows, segments]`` per genome, and what was measured: known windows are not measured again."""

    def __init__(self, losses):
        self.losses = losses
        self.measured = set()

    def __call__(self, genomes, windows):
        self.measured |= {(genome, window) for genome in genomes for window in windows}
        return np.stack([self.losses[genome][windows.start : windows.stop] for genome in genomes])

    def windows(self, genome):
        return sum(one == genome for one, _ in self.measured)


def genome(number: int) -> tuple[int, ...]:
    return tuple(number >> bit & 1 for bit in range(10))


def table(offsets, seed=0, noise=0.05):
    rng = np.random.default_rng(seed)
    difficulty = rng.lognormal(0, 0.5, (WINDOWS, SEGMENTS))
    return Table(
        {
            genome(number): difficulty + offset + noise * rng.normal(size=(WINDOWS, SEGMENTS))
            for number, offset in enumerate(offsets)
        }
    )


def test_a_hopeless_genome_is_dropped_and_a_better_one_measured_whole():
    losses = table([0.0, 0.5, -0.5])
    scores = two_rungs([genome(1), genome(2)], genome(0), losses, WINDOWS)
    assert list(scores) == [genome(1), genome(2)]
    assert [losses.windows(genome(number)) for number in range(3)] == [8, 2, 8]
    assert scores[genome(2)] == losses.losses[genome(2)].mean()
    # What makes the quarter easier or harder than the whole text cancels out.
    assert scores[genome(1)] == pytest.approx(losses.losses[genome(1)].mean(), abs=0.05)


def test_a_dropped_genome_scores_the_best_plus_the_paired_difference():
    losses = table([0.0, 0.5])
    scores = two_rungs([genome(1)], genome(0), losses, WINDOWS)
    first, second = losses.losses[genome(0)], losses.losses[genome(1)]
    assert scores[genome(1)] == pytest.approx(first.mean() + (second[:2] - first[:2]).mean())


@given(st.integers(0, 999), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_lowest_score_is_of_the_whole_text_or_above_the_best(seed, known):
    losses = table(np.random.default_rng(seed).normal(0, 0.02, 12), seed, noise=0.2)
    candidates = [genome(number) for number in range(1, 12)]
    scores = two_rungs(candidates, genome(0) if known else None, losses, WINDOWS)
    whole = [one for one in candidates if losses.windows(one) == WINDOWS]
    dropped = [one for one in candidates if losses.windows(one) == WINDOWS // 4]
    assert len(whole) + len(dropped) == len(candidates)
    assert all(scores[one] == losses.losses[one].mean() for one in whole)
    if known:
        assert all(scores[one] > losses.losses[genome(0)].mean() for one in dropped)
    else:
        first = min(candidates, key=lambda one: losses.losses[one][:2].mean())
        assert first in whole
        assert all(scores[one] > scores[first] for one in dropped)


def test_a_difference_lost_in_rounding_still_scores_above_the_best():
    best = np.array([[1.0, 1.0], [1e9, 1e9], [1e9, 1e9], [1e9, 1e9]])
    other = best + np.array([[1e-9], [0.0], [0.0], [0.0]])
    losses = Table({genome(0): best, genome(1): other})
    assert two_rungs([genome(1)], genome(0), losses, 4)[genome(1)] > best.mean()
    assert losses.windows(genome(1)) == 1


def test_without_a_best_the_lowest_of_the_quarter_is_it():
    losses = table([0.5, 0.3, 0.0, 0.6], noise=0.01)
    scores = two_rungs([genome(number) for number in range(4)], None, losses, WINDOWS)
    assert [losses.windows(one) for one in scores] == [2, 2, 8, 2]
    assert two_rungs([], None, losses, WINDOWS) == {}


def test_a_best_among_the_genomes_and_its_twin_are_measured_whole():
    same = table([0.0]).losses[genome(0)]
    losses = Table({genome(0): same, genome(1): same})
    scores = two_rungs([genome(1), genome(0), genome(1)], genome(0), losses, WINDOWS)
    assert scores == {genome(1): same.mean(), genome(0): same.mean()}
    assert losses.windows(genome(1)) == WINDOWS


def test_one_window_or_one_value_is_measured_whole():
    single = Table({genome(0): np.ones((1, 4)), genome(1): np.full((1, 4), 9.0) + np.arange(4)})
    assert two_rungs([genome(0), genome(1)], None, single, 1) == {genome(0): 1.0, genome(1): 10.5}
    unsure = Table({genome(0): np.ones((4, 1)), genome(1): np.array([[9.0], [0.0], [0.0], [0.0]])})
    assert two_rungs([genome(1)], genome(0), unsure, 4)[genome(1)] == 2.25  # one value has no known error


def test_a_loss_that_is_nan_is_not_hidden():
    losses = table([0.0, 5.0])
    losses.losses[genome(1)][:] = np.nan
    assert math.isnan(two_rungs([genome(1)], genome(0), losses, WINDOWS)[genome(1)])


def test_two_rungs_read_less_and_find_the_best():
    losses = table(np.linspace(0.0, 0.4, 40), noise=0.1)
    scores = two_rungs([genome(number) for number in reversed(range(40))], None, losses, WINDOWS)
    assert len(losses.measured) < 0.5 * 40 * WINDOWS
    assert min(scores, key=scores.__getitem__) in [genome(number) for number in range(4)]


def test_the_error_is_over_segments_or_over_windows_where_that_is_larger():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 64))
    assert paired_difference(a, b)[1] == pytest.approx((a - b).std(ddof=1) / math.sqrt(128))
    drift = np.arange(8.0)[:, None] + np.zeros((8, 64))  # windows differ, segments inside them do not
    mean, error = paired_difference(drift, np.zeros((8, 64)))
    assert mean == 3.5
    assert error == pytest.approx(drift[:, 0].std(ddof=1) / math.sqrt(8))
    assert paired_difference(np.ones((1, 1)), np.zeros((1, 1))) == (1.0, math.inf)
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
