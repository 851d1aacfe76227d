"""Triton kernels on a CPU: code that runs in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent.parent


def interpret(code: str) -> None:
    """Run ``code`` in a process of its own: Triton decides at its import whether it interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; torch for CPUs comes without it")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, env=environment)
