"""kill -9 at any moment, and --resume, end in the plan of an undisturbed run."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfbyte import cli
from halfbyte.plan import load_plan

ROOT = Path(__file__).parent.parent
SEARCH = [
    "--device",
    "cpu",
    "--calib",
    "pydoc",
    "--ctx",
    "64",
    "--calib_tokens",
    "256",
    "--search_tokens",
    "512",
    "--ga_pop",
    "10",
    "--ga_gen",
    "12",
    "--granularity",
    "layer",
]


@pytest.mark.parametrize(
    ("target", "stages"), [("gguf", ["settings.json", "prepared.json", "genetic.json"]), ("sim", ["prepared.json"])]
)
def test_killed_at_random_moments(target, stages, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--model_id", str(tiny_folder("qwen2")), *SEARCH, "--target", target]
    assert cli.run("search", [*command, "--output", "whole.json"]) == 0
    script, work = str(ROOT / "mixed_precision_ptq.py"), tmp_path / ".killed.json.work"
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    moments = random.Random(seed)
    for stage in stages:
        run = [sys.executable, script, *command, "--output", "killed.json", "--resume"]
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 120
        while process.poll() is None and not (work / stage).exists() and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
    if not Path("killed.json").exists():  # else the last one was quicker than its killer
        assert cli.run("search", [*command, "--output", "killed.json", "--resume"]) == 0
    whole, killed = load_plan("whole.json"), load_plan("killed.json")
    assert whole.hash == killed.hash
    assert whole.layers == killed.layers
    assert whole.search == killed.search
