"""Measure one GGUF file in llama.cpp: load time, speed, peak memory, sample text, logits. Run as a worker; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.calibration.windows import first_scored, scored
from halfbyte.core.environment import peak_process_memory
from halfbyte.core.files import check_space, write_error
from halfbyte.core.progress import report
from halfbyte.engines import open_engine
from halfbyte.evaluate.worker import serve

PROMPT_ROOM = 512  # context kept free for the sample's prompt
SPEED_TOKENS = 64  # generated tokens that are timed
SPEED_RUNS = 3


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Measure ``request["path"]``; logits of the scored windows of ``request["text_file"]`` go to ``logits_file``.

    Keys of the request: path, engine, threads, ctx, chunks, text_file, text_name, logits_file, prompt, max_tokens
    (0: no sample and no speed).
    """
    engine = open_engine(request["engine"])
    ctx, max_tokens, stage = request["ctx"], request["max_tokens"], request["stage"]
    result: dict[str, Any] = {"engine": engine.version, "bytes": Path(request["path"]).stat().st_size}
    context = max(ctx, max_tokens + PROMPT_ROOM) if max_tokens else ctx
    with engine.load(request["path"], n_ctx=context, n_threads=request["threads"] or None) as model:
        result["load_seconds"] = model.load_seconds
        if max_tokens:
            report(stage, 0, 1, "speed")
            model.speed(min(64, ctx), 4)  # warm-up
            runs = [model.speed(ctx, min(SPEED_TOKENS, max_tokens)) for _ in range(SPEED_RUNS)]
            result["prompt_tokens_per_second"] = max(run.prompt_tokens_per_second for run in runs)
            result["generation_tokens_per_second"] = max(run.generation_tokens_per_second for run in runs)
            report(stage, 0, 1, "sample text")
            result["sample"] = model.generate(request["prompt"], max_tokens).text
        result["peak_memory"] = peak_process_memory()
        ids = model.tokenize(Path(request["text_file"]).read_text(encoding="utf-8"))
        windows = scored(
            ids, ctx, request["chunks"], bos=model.bos if model.adds_bos else None, where=request["text_name"]
        )
        result["windows"], result["vocab"] = windows, model.n_vocab
        check_space(request["logits_file"], 4 * len(windows) * (ctx - first_scored(ctx) - 1) * model.n_vocab)
        try:
            with open(request["logits_file"], "wb") as handle:
                for done, window in enumerate(windows, start=1):
                    # the last logits predict a token that is not in the window
                    handle.write(model.logits(window, first=first_scored(ctx))[:-1].tobytes())
                    report(stage, done, len(windows), f"window {done}")
        except OSError as error:
            raise write_error(error, request["logits_file"]) from error
    return result


if __name__ == "__main__":
    serve(measure)
