"""Measure one GGUF file in llama.cpp: load time, speed, peak memory, sample text, logits. Run as a worker; no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from halfbyte.calibration.text import first_scored, scored_of_each
from halfbyte.core.environment import peak_process_memory
from halfbyte.core.files import check_space, write_error
from halfbyte.core.progress import report
from halfbyte.engines import open_engine
from halfbyte.engines.llamacpp.model import GGUFModel
from halfbyte.evaluate.worker import Measured, Request, read_texts, serve

PROMPT_ROOM = 512  # context kept free for the sample's prompt
SPEED_TOKENS = 64  # generated tokens that are timed
SPEED_RUNS = 3


def measure(request: Request) -> Measured:
    """Measure the file at ``request.path``, and leave logits ``[windows, ctx / 2 - 1, vocab]`` in its logits file.

    Raises:
        HalfbyteError: the file cannot be loaded, the text is too short, or the disk is full.
    """
    engine = open_engine(request.engine)
    ctx, max_tokens = request.ctx, request.max_tokens
    context = max(ctx, max_tokens + PROMPT_ROOM) if max_tokens else ctx
    with engine.load(request.path, n_ctx=context, n_threads=request.threads or None) as model:
        generated = _generate(model, request) if max_tokens else {}
        peak_memory = peak_process_memory()
        bos = model.bos if model.adds_bos else None
        windows, texts = scored_of_each(
            model.tokenize, read_texts(request), ctx, request.chunks, bos=bos, where=request.text_name
        )
        _write_logits(model, windows, request)
        return Measured(
            engine=engine.version,
            bytes=Path(request.path).stat().st_size,
            load_seconds=model.load_seconds,
            peak_memory=peak_memory,
            windows=windows,
            texts=texts,
            vocab=model.n_vocab,
            logits_file=request.logits_file,
            **generated,
        )


def _generate(model: GGUFModel, request: Request) -> dict[str, Any]:
    """Speed, the best of some runs after a warm-up, and the sample text."""
    report(request.stage, 0, 1, "speed")
    model.speed(min(64, request.ctx), 4)  # warm-up
    runs = [model.speed(request.ctx, min(SPEED_TOKENS, request.max_tokens)) for _ in range(SPEED_RUNS)]
    report(request.stage, 0, 1, "sample text")
    return {
        "prompt_tokens_per_second": max(run.prompt_tokens_per_second for run in runs),
        "generation_tokens_per_second": max(run.generation_tokens_per_second for run in runs),
        "sample": model.generate(request.prompt, request.max_tokens).text,
    }


def _write_logits(model: GGUFModel, windows: list[list[int]], request: Request) -> None:
    first = first_scored(request.ctx)
    check_space(request.logits_file, 4 * len(windows) * (request.ctx - first - 1) * model.n_vocab)
    try:
        with open(request.logits_file, "wb") as handle:
            for done, window in enumerate(windows, start=1):
                # the last logits predict a token that is not in the window
                handle.write(model.logits(window, first=first)[:-1].tobytes())
                report(request.stage, done, len(windows), f"window {done}")
    except OSError as error:
        raise write_error(error, request.logits_file) from error


if __name__ == "__main__":
    serve(lambda request: asdict(measure(Request(**request))))
