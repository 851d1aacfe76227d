"""A search that is interrupted anywhere, by Ctrl-C or kill -9, ends with --resume in the plan of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from halfbyte import pipeline
from halfbyte.core import files
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import listening
from halfbyte.plan import load_plan
from tests.searches import Process, flags, run, same, wait_until

MORE = {"granularity": "layer", "ga_gen": 4}
PLAIN = {"weights": "rtn", "transforms": "none"}  # where only files matter


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder("qwen2")


@pytest.fixture(scope="module")
def stages():
    """What an undisturbed search says it does, in order."""
    return []


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, stages):
    """The plan of an undisturbed search."""
    with listening(lambda progress: stages.append(progress.stage)):
        return run(folder, tmp_path_factory.mktemp("whole") / "plan.json", "gguf", **MORE).plan


def test_interrupted_in_every_stage(folder, whole, stages, tmp_path):
    """Once in each of them, one after the other; what is done stays done."""
    distinct = list(dict.fromkeys(stages))
    assert len(distinct) >= 8
    assert "refine types" in distinct
    output = tmp_path / "plan.json"
    for stage in distinct[1:]:  # nothing is kept while the model is loaded

        def stop(progress, stage=stage) -> None:
            if progress.stage == stage and progress.done > 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), listening(stop):
            run(folder, output, "gguf", **MORE, resume=True)
        assert not output.exists()
    assert same(run(folder, output, "gguf", **MORE, resume=True, verbose=True, lang="zh").plan, whole)
    assert '"resumed": true' in (tmp_path / "plan.report.html").read_text(encoding="utf-8")
    assert not (tmp_path / ".plan.json.work").exists()


def test_a_killed_process_loses_one_generation_at_most(folder, whole, tmp_path):
    """kill -9 soon after each of these files is there, and once Ctrl-C: the promise is the same."""
    output, work = tmp_path / "plan.json", tmp_path / ".plan.json.work"
    arguments = [*flags(folder, "gguf", **MORE), "--output", str(output), "--resume"]
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    moments = random.Random(seed)
    (tmp_path / ".plan.history.json.1.partial.json").touch()  # as kill -9 leaves it in the moment of writing
    stops = {
        "settings.json": signal.SIGKILL,
        "prepared.json": signal.SIGINT,
        "genetic-activations.json": signal.SIGKILL,
        "candidates/block-000.json": signal.SIGKILL,
        "genetic-types.json": signal.SIGKILL,
    }
    for name, number in stops.items():
        process = Process(arguments, tmp_path)
        wait_until(lambda process=process, name=name: (work / name).exists() or not process.running())
        time.sleep(moments.uniform(0, 0.1))
        code = process.stop(number)
        if number == signal.SIGINT and code == 2:  # else it was quicker
            assert "go on with --resume" in process.err
            assert "Traceback" not in process.err
    if not output.exists():
        run(folder, output, "gguf", **MORE, resume=True)
    assert same(load_plan(output), whole)
    assert not list(tmp_path.glob(".*"))  # no work folder, no half-written file


def test_killed_when_all_was_written(folder, tmp_path):
    """What is left then goes with the next run, which says that the plan is there."""
    output, work = tmp_path / "plan.json", tmp_path / ".plan.json.work"
    run(folder, output, "sim", **PLAIN)
    there = sorted(path.name for path in tmp_path.iterdir())
    work.mkdir()
    (work / "settings.json").write_text("{}")
    with pytest.raises(HalfbyteError, match="output already exists"):
        run(folder, output, "sim", **PLAIN, resume=True)
    assert work.exists()  # it is younger than the plan: that of another search
    os.utime(work / "settings.json", (0, 0))
    with pytest.raises(HalfbyteError, match="output already exists"):
        run(folder, output, "sim", **PLAIN, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_a_plan_that_cannot_be_written_can_be_resumed(folder, tmp_path, monkeypatch):
    """Codes that have moved beside the plan move back: without it they would be a stranger's."""
    output, unwritten = tmp_path / "plan.json", []

    def full(_, plan):
        unwritten.append(plan)
        raise HalfbyteError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_plan", full)
        with pytest.raises(HalfbyteError, match="disk is full"):
            run(folder, output, "gguf", **PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == [".plan.json.work"]
    with pytest.raises(HalfbyteError, match="an interrupted search is waiting"):
        run(folder, output, "gguf", **PLAIN)
    with pytest.raises(HalfbyteError, match="the interrupted search had other settings, expected seed=0, got 1"):
        run(folder, output, "gguf", **PLAIN, seed=1, resume=True)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: files.shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(HalfbyteError, match="candidates: disk is too small"):
        run(folder, tmp_path / "other.json", "gguf", **PLAIN, spaces="types")
    assert same(run(folder, output, "gguf", **PLAIN, resume=True).plan, unwritten[0])  # what is there needs no room
