"""What the tests of whole searches share: the smallest options, and a search in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from halfbyte import cli
from halfbyte.options import SearchOptions
from halfbyte.pipeline import SearchResult, search
from halfbyte.plan import Plan

SCRIPT = Path(__file__).parent.parent / "mixed_precision_ptq.py"
SMALLEST = {"calib": "pydoc", "ctx": 64, "calib_tokens": 128, "search_tokens": 128, "ga_pop": 4, "ga_gen": 1}
PATIENCE = 120.0  # seconds; far more than anything here takes


def options(folder: Path, output: Path, target: str, **more: Any) -> SearchOptions:
    """The smallest search of the model in ``folder``; ``more`` changes its options."""
    given = {**SMALLEST, **more}
    return SearchOptions(model_id=str(folder), output=str(output), target=target, device="cpu", **given)


def run(folder: Path, output: Path, target: str, **more: Any) -> SearchResult:
    """Run it."""
    return search(options(folder, output, target, **more))


def flags(folder: Path, target: str, **more: Any) -> list[str]:
    """The same as arguments of the command, without its output."""
    given = {**SMALLEST, "model_id": folder, "target": target, "device": "cpu", **more}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def same(one: Plan, other: Plan) -> bool:
    """Whether two plans say the same, and were found in the same way."""
    return one.to_dict() == other.to_dict()


class Process:
    """``halfbyte search`` in a process of its own, in ``folder``.

    Where that can be done it is a copy of this process, which saves the start of an interpreter; a copy of a process
    that has used CUDA could not compute gradients.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 - as long as this is
        self.code: int | None = None
        environment = {**os.environ, **(environment or {})}
        if hasattr(os, "fork") and not torch.cuda.is_available():
            self.pid = os.fork()
            if self.pid == 0:
                self._become(arguments, folder, environment)
        else:
            command = [sys.executable, str(SCRIPT), *arguments]
            self._popen = subprocess.Popen(command, cwd=folder, env=environment, stdout=self._out, stderr=self._err)
            self.pid = self._popen.pid

    def _become(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        """What the copy does, and all that it does."""
        code = 1
        try:
            sys.stdout, sys.stderr = self._out, self._err
            os.chdir(folder)
            os.environ.update(environment)
            code = cli.run("search", list(arguments))
        except BaseException:  # noqa: BLE001 - nothing may go back to the tests
            traceback.print_exc()
        finally:
            self._out.flush()
            self._err.flush()
            os._exit(code)

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self) -> int:
        """Its exit code."""
        wait_until(lambda: not self.running())
        assert self.code is not None
        return self.code

    def stop(self, number: int = signal.SIGKILL) -> int:
        """Send it a signal, by default that of kill -9; its exit code."""
        if self.running():
            os.kill(self.pid, number)
        return self.wait()

    @property
    def out(self) -> str:
        return self._read(self._out)

    @property
    def err(self) -> str:
        return self._read(self._err)

    def _read(self, file: Any) -> str:
        file.seek(0)
        return file.read()


def wait_until(there: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    limit = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.002)
