"""Run one measurement in a process of its own, so that its peak memory is its own and a crash stays there.

The worker gets its request as JSON on the command line and answers with JSON lines on standard output: progress while
it works, then the result or one error line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import Progress, listening, tell

CLEAN_UP_SECONDS = 10


class WorkerError(HalfbyteError):
    """A worker failed.

    Attributes:
        said: what it wrote on standard error.
    """

    def __init__(self, text: str, said: str) -> None:
        super().__init__(text)
        self.said = said


Work = Callable[[dict[str, Any]], dict[str, Any]]


def run_worker(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """Start ``python -m module`` and wait for its result.

    Raises:
        HalfbyteError: the worker's own error, or that it crashed.
    """
    command = [sys.executable, "-m", module, json.dumps(request)]
    return run_command(command, where=str(request.get("path")))[0]


def run_command(
    command: Sequence[str], *, where: str, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """Start a worker and wait for its result.

    Args:
        command: a process that answers with JSON lines.
        where: what is measured, for messages.
        environment: its variables, by default ours.

    Returns:
        The result, and what the process said on standard error.

    Raises:
        WorkerError: the worker's own error, or that it crashed.
    """
    result: dict[str, Any] | None = None
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as noise:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**(environment or os.environ), "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"},
            stdin=subprocess.PIPE,  # never written to: it closes when this process ends, however that happens
            start_new_session=True,  # with processes of its own, vLLM's for instance, which end with it
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = _message(line)
                if "progress" in message:
                    tell(Progress(**message["progress"]))
                elif "error" in message:
                    process.wait()
                    raise WorkerError(message["error"], _all_of(noise))
                elif "result" in message:
                    result = message["result"]
            code = process.wait()
        except BaseException:
            _end(process, signal.SIGTERM)  # it removes what it was writing
            raise
        finally:
            try:
                process.wait(timeout=CLEAN_UP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            finally:
                _end(process, getattr(signal, "SIGKILL", signal.SIGTERM))
                process.wait()
        said = _all_of(noise)
        if result is None:
            last = ([line for line in said.splitlines() if line.strip()] or ["no message"])[-1]
            raise WorkerError(f"{where}: measurement crashed, got exit code {code}: {last[:200]}", said)
    return result, said


def _end(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to a worker and to what it has started."""
    with suppress(OSError):  # all of them have ended
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.terminate()


def _all_of(noise: IO[str]) -> str:
    noise.seek(0)
    return noise.read()


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

    end_with_parent()
    try:
        with listening(lambda progress: send({"progress": vars(progress)})):
            send({"result": work(json.loads(sys.argv[1]))})
    except HalfbyteError as error:
        send({"error": str(error)})
    except KeyboardInterrupt:
        send({"error": "interrupted"})


def end_with_parent() -> None:
    """Interrupt this process when the one that started it has ended; SIGTERM interrupts it too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def watch() -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 1):  # nothing comes until the other end closes
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(CLEAN_UP_SECONDS)
        os._exit(2)

    signal.signal(signal.SIGTERM, interrupt)
    if os.name == "posix":  # elsewhere a thread that waits for standard input can block the others
        threading.Thread(target=watch, daemon=True).start()


GGUF_WORKER, ORIGINAL_WORKER = "halfbyte.evaluate.measure_gguf", "halfbyte.evaluate.measure_original"


@dataclass(frozen=True)
class Request:
    """One model to measure.

    Attributes:
        path: the GGUF file, or the model id.
        stage: what progress calls it.
        texts, text_name: files of the texts to score by their names, and what they are called together.
        logits_file: where the logits of the scored windows go.
        ctx, chunks: tokens per window, and windows.
        engine: llama.cpp binding.
        threads: CPU threads; 0 is one per core.
        prompt, max_tokens: of the sample text; 0 tokens: neither sample nor speed.
    """

    path: str
    stage: str
    texts: dict[str, str]
    text_name: str
    logits_file: str
    ctx: int
    chunks: int
    engine: str = "xllamacpp"
    threads: int = 0
    prompt: str = ""
    max_tokens: int = 0


@dataclass(frozen=True)
class OriginalRequest(Request):
    """The original, in transformers.

    Attributes:
        device, dtype, trust_remote_code: as in the options.
        f16_path: written as F16 GGUF file if it is not there.
    """

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    f16_path: str = ""


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        engine: what ran the model, with its version.
        bytes: of the file, or of the weights in memory.
        load_seconds: until the model could answer.
        peak_memory: bytes, of the process (of the GPU, where one was used) until text was scored.
        windows: scored tokens, each window with its context.
        texts: name of the text of each window.
        vocab: tokens that a row of logits has.
        logits_file: fp32 logits of all windows.
        prompt_tokens_per_second, generation_tokens_per_second: None if nothing was to be generated.
        sample: the answer to the prompt, likewise.
        fingerprint: identity of the weights; None if the file does not say.
        kernels: what the engine said about the kernels that it chose.
    """

    engine: str
    bytes: int
    load_seconds: float
    peak_memory: int
    windows: list[list[int]]
    vocab: int
    logits_file: str
    prompt_tokens_per_second: float | None = None
    generation_tokens_per_second: float | None = None
    sample: str | None = None
    fingerprint: str | None = None
    kernels: tuple[str, ...] = ()
    texts: list[str] | None = None


def written_texts(folder: Path, texts: Mapping[str, str]) -> dict[str, str]:
    """Write texts for a :class:`Request` into ``folder``: name -> file."""
    files = {}
    for at, (name, text) in enumerate(texts.items()):
        file = folder / f"text-{at}.txt"
        file.write_text(text, encoding="utf-8")
        files[name] = str(file)
    return files


def read_texts(request: Request) -> dict[str, str]:
    """Name -> text."""
    return {name: Path(file).read_text(encoding="utf-8") for name, file in request.texts.items()}


def measure_apart(request: Request) -> Measured:
    """Measure in a process of its own.

    Raises:
        HalfbyteError: the process's own error, or that it crashed.
    """
    worker = ORIGINAL_WORKER if isinstance(request, OriginalRequest) else GGUF_WORKER
    return Measured(**run_worker(worker, asdict(request)))
