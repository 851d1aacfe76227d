"""Measure the original model in transformers, and write it as an F16 GGUF file for llama.cpp. Run as a worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.windows import first_scored
from halfbyte.core.device import peak_memory, resolve_device, resolve_dtype
from halfbyte.core.progress import report
from halfbyte.evaluate.quality import LogitsFile, model_logits, sample_text, windows_for
from halfbyte.evaluate.worker import serve
from halfbyte.models.estimate import check_memory, estimate_load
from halfbyte.models.loading import SourceModel, find, load
from halfbyte.models.modules import vocabulary
from halfbyte.targets.gguf_files.writer import write_gguf

SPEED_TOKENS = 32


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Measure ``request["path"]`` (a model id).

    Keys of the request: path, device, dtype, trust_remote_code, threads, ctx, chunks, text_file, text_name,
    logits_file, prompt, max_tokens (0: no sample and no speed), f16_path
    (written if it is not there), stage.
    """
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    stage, ctx, max_tokens = request["stage"], request["ctx"], request["max_tokens"]
    device = resolve_device(request["device"])
    dtype = resolve_dtype(request["dtype"], device)
    origin = find(request["path"], trust_remote_code=request["trust_remote_code"])
    check_memory(estimate_load(origin.config, origin.family, dtype), device)
    report(stage, 0, 1, "load")
    started = time.perf_counter()
    source = load(origin, device=device, dtype=dtype)
    result: dict[str, Any] = {
        "engine": f"transformers ({str(dtype).removeprefix('torch.')}, {device.type})",
        "load_seconds": time.perf_counter() - started,
        "fingerprint": source.fingerprint,
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters()),
    }
    if max_tokens:
        report(stage, 0, 1, "speed")
        result.update(_speed(source, ctx, min(SPEED_TOKENS, max_tokens)))
        report(stage, 0, 1, "sample text")
        result["sample"] = sample_text(source, request["prompt"], max_tokens)
    result["peak_memory"] = peak_memory(device)
    text = Path(request["text_file"]).read_text(encoding="utf-8")
    windows = windows_for(source, text, ctx, request["chunks"], where=request["text_name"])
    vocab = vocabulary(source.model, source.family)
    kept = LogitsFile(Path(request["logits_file"]), vocab, ctx - first_scored(ctx) - 1)
    kept.write(windows, model_logits(source.model), stage)
    result["windows"], result["vocab"] = windows, vocab
    if not Path(request["f16_path"]).exists():
        write_gguf(
            request["f16_path"],
            source,
            embedding_type="F16",
            output_type="F16",
            metadata={"halfbyte.fingerprint": source.fingerprint},
        )
    return result


def _speed(source: SourceModel, prompt_tokens: int, generate_tokens: int) -> dict[str, float]:
    """Prompt and generation tokens per second; the best of two runs after a warm-up."""
    ids = torch.randint(source.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(source.device)

    def prompt() -> None:
        with torch.no_grad():
            source.model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def generate() -> None:
        source.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids[:, :1],
            attention_mask=torch.ones_like(ids[:, :1]),
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=generate_tokens,
            min_new_tokens=generate_tokens,
            pad_token_id=0,
        )

    prompt()
    return {
        "prompt_tokens_per_second": prompt_tokens / min(_seconds(prompt, source.device) for _ in range(2)),
        "generation_tokens_per_second": generate_tokens / min(_seconds(generate, source.device) for _ in range(2)),
    }


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    serve(measure)
