from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.baselines import random_genome, rule_genome
from halfbyte.search.problem import Problem, activation_problem
from tests.search.test_problem import is_full, problems


@given(problems(max_units=8), st.integers(0, 99))
def test_random_genomes_are_full(problem, seed):
    genome = random_genome(problem, np.random.default_rng(seed))
    assert is_full(problem, genome)
    assert genome == random_genome(problem, np.random.default_rng(seed))


def test_random_genomes_have_no_favourites():
    problem = activation_problem((1,) * 10, 0.75, range(10))
    rng = np.random.default_rng(0)
    share = np.mean([random_genome(problem, rng) for _ in range(1000)], axis=0)
    assert share == pytest.approx(np.full(10, 0.5), abs=0.06)


def test_the_rule_has_its_own_threshold_at_the_edges_and_ignores_the_budget():
    problem = activation_problem((1, 1, 1, 1), 0.5, (1, 1, 1, 1))
    edges = (True, False, False, True)
    assert rule_genome(problem, (2.0, 2.0, 3.0, 1.5), edges) == (1, 0, 1, 0)


def test_the_rule_takes_the_last_format_of_longer_menus():
    problem = Problem(((1, 2, 3), (1, 2)), ((2, 1, 0), (1, 0)), 9)
    assert rule_genome(problem, (3.0, 3.0), (False, False)) == (2, 1)


@pytest.mark.parametrize(
    ("ratios", "edges", "said"),
    [
        ((2.0,), (True, False), "ratios: expected 2 values"),
        ((2.0, 1.0), (True,), "edges: expected 2 values"),
        ((2.0, math.nan), (True, False), "ratios: a value is NaN"),
    ],
)
def test_the_rule_refuses_what_does_not_fit(ratios, edges, said):
    with pytest.raises(HalfbyteError, match=said):
        rule_genome(activation_problem((1, 1), 0.75, (1, 1)), ratios, edges)
