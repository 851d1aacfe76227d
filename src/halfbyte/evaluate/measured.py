"""What a measuring process is asked, and what it answers. No torch: the process of a GGUF file reads this too."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from halfbyte.evaluate.worker import run_worker

GGUF_WORKER, ORIGINAL_WORKER = "halfbyte.evaluate.measure_gguf", "halfbyte.evaluate.measure_original"


@dataclass(frozen=True)
class Request:
    """One model to measure.

    Attributes:
        path: the GGUF file, or the model id.
        stage: what progress calls it.
        text_file, text_name: the text to score, and what it is called.
        logits_file: where the logits of the scored windows go.
        ctx, chunks: tokens per window, and windows.
        engine: llama.cpp binding.
        threads: CPU threads; 0 is one per core.
        prompt, max_tokens: of the sample text; 0 tokens: neither sample nor speed.
    """

    path: str
    stage: str
    text_file: str
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
        vocab: tokens that a row of logits has.
        logits_file: fp32 logits of all windows.
        prompt_tokens_per_second, generation_tokens_per_second: None if nothing was to be generated.
        sample: the answer to the prompt, likewise.
        fingerprint: identity of the weights; None if the file does not say.
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


def measure_apart(request: Request) -> Measured:
    """Measure in a process of its own.

    Raises:
        HalfbyteError: the process's own error, or that it crashed.
    """
    worker = ORIGINAL_WORKER if isinstance(request, OriginalRequest) else GGUF_WORKER
    return Measured(**run_worker(worker, asdict(request)))
