"""Menus of made-up models, and what tests ask of genomes."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from halfbyte.search.menu import Menu

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
