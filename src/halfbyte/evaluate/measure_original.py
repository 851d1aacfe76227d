"""Measure the original model in transformers, and write it as an F16 GGUF file for llama.cpp. Run as a worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.text import scored_tokens
from halfbyte.core.environment import peak_memory, resolve_device, resolve_dtype
from halfbyte.core.progress import report
from halfbyte.evaluate.quality import LogitsFile, model_logits, sample_text, windows_of
from halfbyte.evaluate.worker import Measured, OriginalRequest, read_texts, serve
from halfbyte.models.estimate import check_memory, estimate_load
from halfbyte.models.loading import SourceModel, find, load
from halfbyte.models.modules import vocabulary
from halfbyte.targets.gguf_files.writer import write_gguf

SPEED_TOKENS = 32


def measure(request: OriginalRequest) -> Measured:
    """Measure the model ``request.path``, and leave logits ``[windows, ctx / 2 - 1, vocab]`` in its logits file.

    Raises:
        HalfbyteError: the model cannot be loaded, the text is too short, or the disk is full.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    device = resolve_device(request.device)
    source, load_seconds = _load(request, device)
    generated = _generate(source, request) if request.max_tokens else {}
    peak = peak_memory(device)
    windows, texts = windows_of(
        source.tokenizer, read_texts(request), request.ctx, request.chunks, where=request.text_name
    )
    vocab = vocabulary(source.model, source.family)
    kept = LogitsFile(Path(request.logits_file), vocab, scored_tokens(request.ctx))
    kept.write(windows, model_logits(source.model), request.stage)
    if not Path(request.f16_path).exists():
        write_gguf(
            request.f16_path,
            source,
            embedding_type="F16",
            output_type="F16",
            metadata={"halfbyte.fingerprint": source.fingerprint},
        )
    return Measured(
        engine=f"transformers ({str(source.dtype).removeprefix('torch.')}, {device.type})",
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters()),
        load_seconds=load_seconds,
        peak_memory=peak,
        windows=windows,
        texts=texts,
        vocab=vocab,
        logits_file=request.logits_file,
        fingerprint=source.fingerprint,
        **generated,
    )


def _load(request: OriginalRequest, device: torch.device) -> tuple[SourceModel, float]:
    """The model, and the seconds that it took to load it."""
    dtype = resolve_dtype(request.dtype, device)
    origin = find(request.path, trust_remote_code=request.trust_remote_code)
    check_memory(estimate_load(origin.config, origin.family, dtype), device)
    report(request.stage, 0, 1, "load")
    started = time.perf_counter()
    source = load(origin, device=device, dtype=dtype)
    return source, time.perf_counter() - started


def _generate(source: SourceModel, request: OriginalRequest) -> dict[str, Any]:
    """Speed and the sample text."""
    report(request.stage, 0, 1, "speed")
    speed = _speed(source, request.ctx, min(SPEED_TOKENS, request.max_tokens))
    report(request.stage, 0, 1, "sample text")
    return {**speed, "sample": sample_text(source, request.prompt, request.max_tokens)}


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
    serve(lambda request: asdict(measure(OriginalRequest(**request))))
