"""Run one measurement in a process of its own, so that its peak memory is its own and a crash stays there.

The worker gets its request as JSON on the command line and answers with JSON lines on standard output: progress while
it works, then the result or one error line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import listening, report

CLEAN_UP_SECONDS = 10
Work = Callable[[dict[str, Any]], dict[str, Any]]


def run_worker(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """Start ``python -m module`` and wait for its result.

    Raises:
        HalfbyteError: the worker's own error, or that it crashed.
    """
    result: dict[str, Any] | None = None
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as noise:
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"},
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = _message(line)
                if "progress" in message:
                    report(**message["progress"])
                elif "error" in message:
                    process.wait()
                    raise HalfbyteError(message["error"])
                elif "result" in message:
                    result = message["result"]
            code = process.wait()
        finally:
            try:
                process.wait(timeout=CLEAN_UP_SECONDS)  # interrupted too: it removes what it was writing
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if result is None:
            noise.seek(0)
            last = ([line for line in noise.read().splitlines() if line.strip()] or ["no message"])[-1]
            raise HalfbyteError(f"{request.get('path')}: measurement crashed, got exit code {code}: {last[:200]}")
    return result


def _message(line: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:  # a library printed something
        return {}
    return message if isinstance(message, dict) else {}


def serve(work: Work) -> None:
    """The worker's side: run ``work`` on the request and answer."""

    def send(message: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    try:
        with listening(lambda progress: send({"progress": vars(progress)})):
            send({"result": work(json.loads(sys.argv[1]))})
    except HalfbyteError as error:
        send({"error": str(error)})
    except KeyboardInterrupt:
        send({"error": "interrupted"})
