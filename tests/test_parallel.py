"""Several processes make one search: the same plan as one process, and a clear end when one of them dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.core import distributed
from halfbyte.plan import load_plan
from tests.searches import SCRIPT, Process, flags, run, same, wait_until

PLAIN = {"weights": "rtn", "transforms": "none"}
MORE = {"weights": "rtn", "search_tokens": 256, "ga_gen": 2}


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder("qwen2")


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The plan that one process finds, activation bits and types."""
    return run(folder, tmp_path_factory.mktemp("alone") / "plan.json", "gguf", **MORE).plan


def group(arguments: list[str], folders: list[Path]) -> list[Process]:
    """Processes as torchrun would start them, each in its folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(folders))]
    common = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Process(arguments, place, {**common, **rank}) for place, rank in zip(folders, own, strict=True)]


def test_processes_that_share_no_folder(folder, alone, tmp_path):
    """As on two machines: what the first prepared travels, and nothing stays behind at the second."""
    places = [tmp_path / "0", tmp_path / "1"]
    first, second = group([*flags(folder, "gguf", **MORE), "--output", "plan.json"], places)
    assert (first.wait(), second.wait()) == (0, 0), first.err + second.err
    assert same(load_plan(tmp_path / "0" / "plan.json"), alone)
    assert "wrote plan.json" in first.out
    assert second.out == ""
    assert list((tmp_path / "1").iterdir()) == []


def test_processes_that_share_a_folder(folder, alone, tmp_path):
    """Each encodes its share of the blocks."""
    places = [tmp_path / "both"] * 2
    first, second = group([*flags(folder, "gguf", **MORE), "--output", "plan.json"], places)
    assert (first.wait(), second.wait()) == (0, 0), first.err + second.err
    assert same(load_plan(tmp_path / "both" / "plan.json"), alone)
    assert not list((tmp_path / "both").glob(".*"))


@pytest.mark.parametrize(("target", "hardware"), [("sim", "auto"), ("vllm", "blackwell")])
def test_codes_are_chosen_together(folder, tmp_path, target, hardware):
    """Calibration text and rows of weights are shared; sums in another order may change codes, always in the same way.

    On Blackwell the scales of a unit depend on each other, so its rows are not shared.
    """
    own = {"hardware": hardware, "calib_tokens": 256, "target_compression": 0.75 if target == "sim" else 1.0}
    places = [tmp_path / name for name in ("0", "1", "2", "3")]
    for pair in (places[:2], places[2:]):
        both = group([*flags(folder, target, **own), "--output", "plan.json"], pair)
        assert [process.wait() for process in both] == [0, 0], both[0].err + both[1].err
    once, again = (load_plan(place / "plan.json") for place in (places[0], places[2]))
    assert same(once, again)
    alone = run(folder, tmp_path / "plan.json", target, **own).plan
    assert once.search["channel_scales"] == alone.search["channel_scales"]
    dearest = "all A8" if target == "sim" else "all A16"  # the bits chosen may differ
    assert once.search["validation"][dearest] == pytest.approx(alone.search["validation"][dearest], rel=0.1)


def test_a_dead_process_is_noticed_and_the_rest_can_be_resumed(folder, tmp_path):
    """The time it takes to find the plan is long, but the group dies in the middle."""
    longer = {**MORE, "ga_pop": 12, "ga_gen": 20, "spaces": "activations", "granularity": "layer"}
    places, arguments = [tmp_path / "shared"] * 2, [*flags(folder, "gguf", **longer), "--output", "plan.json"]
    first, second = group(arguments, places)
    state = tmp_path / "shared" / ".plan.json.work" / "genetic-activations.json"
    wait_until(lambda: state.exists() or not first.running())
    second.stop()
    assert first.wait() == 2, first.err
    assert "error: process 0 of 2: another process of the group has stopped" in first.err
    assert "--resume" in first.err
    assert "Traceback" not in first.err
    again = group([*arguments, "--resume"], places)
    assert [process.wait() for process in again] == [0, 0], again[0].err
    expected = run(folder, tmp_path / "plan.json", "gguf", **longer).plan
    assert same(load_plan(tmp_path / "shared" / "plan.json"), expected)


@pytest.mark.slow  # three interpreters start
def test_torchrun_ends_in_the_plan_of_one_process(folder, tmp_path):
    """The command as the documents have it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(SCRIPT), *flags(folder, "sim", **PLAIN), "--output", "plan.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote plan.json\n") == 1  # one process speaks
    assert not list(tmp_path.glob(".*"))
    alone = run(folder, tmp_path / "alone.json", "sim", **PLAIN).plan
    assert same(load_plan(tmp_path / "plan.json"), alone)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_parts_come_together_in_order(monkeypatch, size, count):
    items = list(range(count))
    groups = []
    for rank in range(size):
        one = distributed._TorchGroup.__new__(distributed._TorchGroup)
        one.rank, one.size = rank, size
        groups.append(one)
    parts = [list(one.share(items)) for one in groups]
    for one in groups:
        monkeypatch.setattr(one, "_gather", lambda value: parts, raising=False)
        assert one.merge([]) == items
