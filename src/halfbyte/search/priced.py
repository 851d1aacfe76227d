"""A second budget, time, turned into a price: the knapsack stays one with a single constraint.

With a price p per unit of time, whatever minimises loss + p · time loses least among all that are as fast (Everett,
"Generalized Lagrange multiplier method", Operations Research 11, 1963). The price is raised until the knapsack's own
solution keeps to the limit; the search then pays the same price for every genome, so both look for the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.search.menu import Menu, pruned
from halfbyte.search.space import Genome

Table = Sequence[Sequence[float]]  # [units][places]
DOUBLINGS, HALVINGS = 60, 20  # of the price
RAISE = 1.02  # of the price, where the exact knapsack is slower than the greedy one that it was found for
HEADROOM = 0.02  # above the fastest of all, where the limit is out of reach: the last percents of time cost most


@dataclass(frozen=True)
class Offer:
    """The choices that are worth having at a price, as a search space.

    Its genomes are places on the shortened menus.

    Attributes:
        space: losses are those of the choices plus the price of their time.
        places: unit -> places on the whole menu that are offered.
        times: of all choices, in units of the limit.
        price: of a time as long as the limit, in the unit of the losses.
    """

    space: Menu
    places: tuple[tuple[int, ...], ...]
    times: Table
    price: float

    def whole(self, genome: Genome) -> Genome:
        """``genome`` as places on the whole menus."""
        return tuple(places[gene] for places, gene in zip(self.places, genome, strict=True))

    def below(self, whole: Genome) -> Genome:
        """The genome with the largest choices on offer that are no larger than those of ``whole``, else the least."""
        return tuple(
            max((at for at, place in enumerate(places) if place <= gene), default=0)
            for places, gene in zip(self.places, whole, strict=True)
        )

    def time(self, genome: Genome) -> float:
        """Of all units together, in units of the limit."""
        return sum(times[place] for times, place in zip(self.times, self.whole(genome), strict=True))


def offer_within(
    costs: Sequence[Sequence[int]], losses: Table, times: Table, capacity: int, *, limit: float
) -> tuple[Offer, Genome]:
    """The offer at the least price whose knapsack takes no longer than ``limit``, and that knapsack.

    Args:
        costs, losses: see :class:`halfbyte.search.menu.Menu`.
        times: of each choice, in any unit, not negative.
        limit: for all units together; where nothing that fits is as fast, a little more than the fastest takes.

    Raises:
        HalfbyteError: what a menu refuses.
    """

    def at_price(price: float) -> Offer:
        priced = [
            [loss + price * time for loss, time in zip(*rows, strict=True)]
            for rows in zip(losses, relative, strict=True)
        ]
        places = tuple(tuple(pruned(*rows)) for rows in zip(costs, priced, strict=True))
        offered = tuple(tuple(row[place] for place in own) for row, own in zip(costs, places, strict=True))
        paid = tuple(tuple(row[place] for place in own) for row, own in zip(priced, places, strict=True))
        return Offer(Menu(offered, paid, capacity), places, relative, price)

    def greedy_time(price: float) -> float:
        offer = at_price(price)
        return offer.time(offer.space.solve(np.ones(offer.space.size)))

    relative = [[time / limit for time in row] for row in times]
    free = at_price(0.0)
    genome = free.space.knapsack()
    if free.time(genome) <= 1:
        return free, genome
    high = max(sum(row[0] for row in losses), np.finfo(float).tiny)
    fastest = greedy_time(high * 2.0**DOUBLINGS)
    if fastest * (1 + HEADROOM) > 1:
        return offer_within(costs, losses, times, capacity, limit=limit * fastest * (1 + HEADROOM) ** 2)
    low = 0.0
    while greedy_time(high) > 1:
        low, high = high, 4 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if greedy_time(middle) > 1 else (low, middle)
    while True:
        offer = at_price(high)
        genome = offer.space.knapsack()
        if offer.time(genome) <= 1:
            return offer, genome
        high *= RAISE
