"""A slice of ``benchmarks/fuzz.py``: hostile input of every kind, and none of the faults that are counted there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, and changes the user")
def test_a_slice_of_the_hostile_cases():
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--cases", "40", "--seed", "105"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "| all" in done.stdout
