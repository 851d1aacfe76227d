"""Several processes make one search: the same plan as one process, and a clear end when one of them dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfbyte import cli
from halfbyte.plan import load_plan

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "mixed_precision_ptq.py")
QUICK = ["--device", "cpu", "--calib", "pydoc", "--ctx", "64", "--calib_tokens", "128", "--weights", "rtn"]
SEARCH = ["--search_tokens", "256", "--ga_pop", "6"]


def start(command: list[str], rank: int, size: int, port: int, folder: Path) -> subprocess.Popen:
    """One process of a group, as torchrun would start it, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, SCRIPT, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def same(one: Path, other: Path) -> bool:
    plans = [load_plan(path) for path in (one, other)]
    return all(
        getattr(plans[0], what) == getattr(plans[1], what) for what in ("layers", "hash", "search", "codes_sha256")
    )


def test_torchrun_ends_in_the_plan_of_one_process(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--model_id", str(tiny_folder("qwen2")), *QUICK, *SEARCH, "--ga_gen", "3"]
    assert cli.run("search", [*command, "--output", "one.json"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, SCRIPT, *command, "--output", "two.json"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("wrote ") == 11  # one process speaks
    assert same(tmp_path / "one.json", tmp_path / "two.json")
    assert not list(tmp_path.glob(".*work*"))


def test_processes_that_share_no_folder(tiny_folder, tmp_path, monkeypatch):
    """As on two machines: what the first prepared travels, and nothing stays behind at the second."""
    monkeypatch.chdir(tmp_path)
    command = ["--model_id", str(tiny_folder("llama")), *QUICK, *SEARCH, "--ga_gen", "2", "--output", "plan.json"]
    assert cli.run("search", command) == 0
    port = free_port()
    group = [start(command, rank, 2, port, tmp_path / str(rank)) for rank in range(2)]
    for process in group:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert same(tmp_path / "plan.json", tmp_path / "0" / "plan.json")
    assert list((tmp_path / "1").iterdir()) == []
    assert out == ""


def test_a_dead_process_is_noticed_and_the_rest_can_be_resumed(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--model_id", str(tiny_folder("llama")), *QUICK, *SEARCH, "--ga_gen", "200", "--output", "plan.json"]
    port, folder = free_port(), tmp_path / "group"
    first, second = (start(command, rank, 2, port, folder) for rank in range(2))
    state = folder / ".plan.json.work" / "genetic.json"
    limit = time.monotonic() + 120
    while not state.exists() and time.monotonic() < limit and first.poll() is None:
        time.sleep(0.02)
    assert first.poll() is None
    second.kill()
    second.communicate()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 2, err
    assert "error: process 0 of 2: another process of the group has stopped" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert cli.run("search", command) == 0
    again = [start([*command, "--resume"], rank, 2, free, folder) for free in [free_port()] for rank in range(2)]
    for process in again:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert same(tmp_path / "plan.json", folder / "plan.json")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_parts_come_together_in_order(monkeypatch, size, count):
    from halfbyte import parallel

    items = list(range(count))
    groups = []
    for rank in range(size):
        group = parallel._TorchGroup.__new__(parallel._TorchGroup)
        group.rank, group.size = rank, size
        groups.append(group)
    parts = [list(group.share(items)) for group in groups]
    for group in groups:
        monkeypatch.setattr(group, "_gather", lambda value: parts, raising=False)
        assert group.merge([]) == items
