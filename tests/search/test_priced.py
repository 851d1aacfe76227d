from __future__ import annotations

import itertools
from typing import cast

import numpy as np
import pytest

from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.fitness import PricedEvaluator
from halfbyte.search.priced import HEADROOM, offer_within


def tables(seed, units=5, places=4):
    """Costs that rise along each menu, losses that fall, and times in no order."""
    rng = np.random.default_rng(seed)
    costs = np.cumsum(rng.integers(1, 20, (units, places)), axis=1)
    losses = np.sort(rng.lognormal(0, 1, (units, places)), axis=1)[:, ::-1]
    times = rng.uniform(1, 3, (units, places))
    capacity = int(costs.sum(axis=0)[-2])
    return costs.tolist(), losses.tolist(), times.tolist(), capacity


def total(table, genome):
    return sum(row[gene] for row, gene in zip(table, genome, strict=True))


def legal(costs, capacity):
    every = itertools.product(*(range(len(row)) for row in costs))
    return [genome for genome in every if total(costs, genome) <= capacity]


@pytest.mark.parametrize("seed", range(12))
def test_no_mixture_at_least_as_fast_loses_less(seed):
    """Everett's theorem: the solution at a price is the best of all that take no longer than it does."""
    costs, losses, times, capacity = tables(seed)
    mixtures = legal(costs, capacity)
    fastest = min(total(times, genome) for genome in mixtures)
    slowest = total(times, min(mixtures, key=lambda genome: total(losses, genome)))
    limit = (fastest + slowest) / 2
    offer, knapsack = offer_within(costs, losses, times, capacity, limit=limit)
    genome = offer.whole(knapsack)
    assert total(costs, genome) <= capacity
    assert total(times, genome) <= limit * (1 + 1e-9) or fastest * (1 + HEADROOM) > limit
    assert offer.time(knapsack) == pytest.approx(total(times, genome) / limit) or fastest * (1 + HEADROOM) > limit
    as_fast = [other for other in mixtures if total(times, other) <= total(times, genome)]
    assert total(losses, genome) <= min(total(losses, other) for other in as_fast) * (1 + 1e-9)


def test_time_costs_nothing_where_there_is_enough():
    costs, losses, times, capacity = tables(0)
    offer, knapsack = offer_within(costs, losses, times, capacity, limit=1e9)
    best = min(legal(costs, capacity), key=lambda genome: total(losses, genome))
    assert offer.price == 0
    assert total(losses, offer.whole(knapsack)) == pytest.approx(total(losses, best))


def test_a_limit_out_of_reach_gives_nearly_the_fastest():
    costs, losses, times, capacity = tables(1)
    fastest = min(total(times, genome) for genome in legal(costs, capacity))
    offer, knapsack = offer_within(costs, losses, times, capacity, limit=fastest / 10)
    assert total(times, offer.whole(knapsack)) <= fastest * (1 + HEADROOM) ** 2 * (1 + 1e-9)


def test_below_is_what_is_offered_and_no_larger():
    costs, losses, times, capacity = tables(2)
    offer, _ = offer_within(costs, losses, times, capacity, limit=total(times, [0] * 5))
    for whole in [(3, 3, 3, 3, 3), (0, 1, 2, 3, 0)]:
        nearest = offer.whole(offer.below(whole))
        for places, gene, own in zip(offer.places, whole, nearest, strict=True):
            assert own == max(place for place in places if place <= gene)


class Losses:
    """KL of a genome is the sum of its genes."""

    windows, length = 2, 8

    def losses(self, genomes, windows=None):
        count = self.windows if windows is None else len(list(windows))
        return np.array([np.full((count, 3), float(sum(genome))) for genome in genomes])


def test_the_price_counts_from_the_limit():
    costs, losses, times, capacity = tables(3)
    offer, knapsack = offer_within(costs, losses, times, capacity, limit=0.9 * total(times, [1] * 5))
    evaluator = PricedEvaluator(cast(KLEvaluator, Losses()), offer)
    expected = sum(offer.whole(knapsack)) + offer.price * (offer.time(knapsack) - 1)
    assert evaluator.score(knapsack) == pytest.approx(expected)
    assert evaluator.losses([knapsack], range(1)).shape == (1, 1, 3)
