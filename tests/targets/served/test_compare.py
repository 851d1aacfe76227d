"""Telling from answers what was run."""

from __future__ import annotations

import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.targets.served.report import distance, ran_as

TWINS = {"w4a16": [-1.0, -2.0], "w4a8": [-1.1, -2.1], "w4a4": [-1.5, -3.0]}


def test_distance_is_per_token():
    assert distance([-1.0, -2.0], [-1.5, -2.0]) == 0.25
    with pytest.raises(HalfbyteError, match="other tokens"):
        distance([-1.0], [-1.0, -2.0])
    with pytest.raises(HalfbyteError, match="other tokens"):
        distance([], [])


def test_a_folder_that_ran_as_a_twin():
    verdict = ran_as([-1.1, -2.1], TWINS)
    assert verdict.alike == ("w4a8",)
    assert "computed as w4a8" in verdict.text


def test_a_mixed_folder_is_none_of_them():
    verdict = ran_as([-1.2, -2.2], TWINS)
    assert verdict.alike == ()
    assert "nearest to w4a8" in verdict.text


def test_an_engine_that_ignores_activation_bits():
    verdict = ran_as([-1.0], {"w4a16": [-1.0], "w4a8": [-1.0], "w4a4": [-1.0]})
    assert "change nothing" in verdict.text
