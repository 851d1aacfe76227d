"""How much of a command is done and left, and how little of it is said."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from halfbyte.core.progress import Progress
from halfbyte.report import terminal
from halfbyte.report.forecast import Forecast
from halfbyte.report.terminal import Drawing

FORETOLD = {"encode": 60.0, "search": 30.0, "refine": 30.0}


def after(took, share_of_last, foretold=FORETOLD):
    """A forecast when stages have taken so long, the last of them a share of it; and the time."""
    forecast, now = Forecast(), 0.0
    forecast.note(Progress("time", 1, 1, expected=foretold), now)
    for at, (stage, seconds) in enumerate(took.items()):
        steps = 10 if at + 1 < len(took) else round(10 * share_of_last)
        for step in range(steps):
            now += seconds / 10
            forecast.note(Progress(stage, step + 1, 10), now)
    return forecast, now


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.0])
def test_at_half_time_the_time_left_is_right(slower):
    """Whatever the machine, if all stages are slower alike."""
    took = {stage: slower * seconds for stage, seconds in FORETOLD.items()}
    forecast, now = after(took, 0.0)
    assert now == pytest.approx(slower * 90)
    forecast, now = after({"encode": took["encode"]}, 1.0)
    assert forecast.left(now) == pytest.approx(slower * 60, rel=0.01)
    assert forecast.share(now) == pytest.approx(0.5, abs=0.01)


def test_a_stage_goes_by_its_own_pace_once_it_is_known():
    forecast, now = after({"encode": 120.0}, 0.5)  # twice as slow as foretold, half done
    assert forecast.left(now) == pytest.approx(60 + 60, rel=0.01)
    assert forecast.left(now + 20) == pytest.approx(100, rel=0.01)  # between two reports
    assert forecast.left(now + 1000) == 0


def test_stages_that_were_left_out_are_done():
    forecast, now = after({"refine": 30.0}, 0.5)  # a resumed search
    assert forecast.left(now) == pytest.approx(15, rel=0.01)


def test_without_a_forecast_only_the_stage_is_known():
    forecast = Forecast()
    forecast.note(Progress("export", 0, 4), 0.0)
    assert forecast.left(1.0) is None
    forecast.note(Progress("export", 1, 4), 2.0)
    assert forecast.left(2.0) == pytest.approx(6)
    assert forecast.share(2.0) == 0.25


@pytest.mark.parametrize("verbose", [False, True])
def test_lines_where_there_is_no_terminal(monkeypatch, verbose):
    clock = iter(range(0, 100_000, 20))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    said = io.StringIO()
    draw = Drawing(said)
    draw.verbose = verbose
    draw.report(Progress("time", 1, 1, expected={"encode": 100.0, "search": 100.0}))
    for done in range(1, 6):
        draw.report(Progress("encode", done, 5, f"block {done}"))
    draw.finish()
    lines = said.getvalue().splitlines()
    if verbose:
        assert "[ 50%] encode: block 5 (1 min 40 s, 1 min 40 s left)" in lines
        assert len(lines) > 3
    else:
        assert lines == [
            "[ 10%] encode (20.0 s, 3 min 00 s left)",
            "[ 30%] encode (1 min 00 s, 2 min 20 s left)",
            "[ 50%] encode (1 min 40 s, 1 min 40 s left)",
        ]


def test_a_live_line():
    said = io.StringIO()
    draw = Drawing(said)
    draw._console = Console(file=said, force_terminal=True, width=100)
    draw.report(Progress("time", 1, 1, expected={"encode": 1000.0, "search": 1000.0}))
    draw.report(Progress("encode", 1, 5, "block 1"))
    draw.report(Progress("note", 1, 1, "wikitext2 was not available", warning=True))
    draw.finish(done=True)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.getvalue()).splitlines()[-1]
    assert "encode" in last
    assert "100%" in last
    assert "left" not in last
    assert draw.warnings == ["wikitext2 was not available"]
