"""A model folder in vLLM: logits of windows, speed, memory, a continuation. Runs in any Python that has vLLM.

    ENV/bin/python serve_worker.py JOB.json

Nothing of halfbyte is imported here. The job is one JSON object, :class:`Job`; standard output gets JSON lines as
``halfbyte.evaluate.worker`` reads them: progress, then the result or one error. vLLM's messages go to standard error.

Logits are taken where the engine computes them: vLLM adds :class:`LogitsTap` to its worker classes
(``worker_extension_cls``), and that listens to the model's ``compute_logits`` while one window at a time is a prompt
whose log-probabilities are asked for. vLLM's answer has one number per token, a vocabulary of them would be a
dictionary per token; it is used to check that the right rows were taken. Written for vLLM 0.23 to 0.33.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LARGEST_DIFFERENCE = 1e-2  # nats: between vLLM's own log-probability of a token and that of the logits that were taken
MEMORY_SHARE = 0.9  # of what is free on the GPU; how much cache is made of it is a setting of its own
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Speed:
    """What is timed, each the best of ``runs`` after a warm-up.

    Attributes:
        prompts, prompt_tokens: prompts that are read together, and tokens in each.
        sequences: how many sequences are generated together, one measurement each.
        new_tokens: tokens generated per sequence.
        runs: repetitions.
    """

    prompts: int
    prompt_tokens: int
    sequences: list[int]
    new_tokens: int
    runs: int = 2


@dataclass(frozen=True)
class Job:
    """What to do with one folder.

    Attributes:
        folder: the model.
        stage: what progress calls it.
        settings: further keyword arguments of ``vllm.LLM``.
        windows: token ids, one list per window; of each the predictions from position ``first`` on are kept.
        logits_file: where they go, fp32 ``[windows, window - first - 1, vocabulary]``, raw.
        speed: what is timed; None for nothing.
        prompt: token ids that are continued greedily by ``max_tokens`` tokens; empty for none.
        stop: token ids that end it.
        emulated_below: compute capability, such as 100, under which vLLM is to emulate the folder's kernels: those that
            it would choose there leave inputs as they are.
    """

    folder: str
    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    windows: list[list[int]] = field(default_factory=list)
    first: int = 0
    logits_file: str = ""
    speed: Speed | None = None
    prompt: list[int] = field(default_factory=list)
    max_tokens: int = 0
    stop: list[int] = field(default_factory=list)
    emulated_below: int = 0


class LogitsTap:
    """Methods that vLLM adds to its worker; they run in the process that has the model, one per GPU."""

    def halfbyte_tap(self: Any) -> None:
        """From now on keep what ``compute_logits`` returns: in the first process alone, for each may have all of it."""
        self.halfbyte_seen = []
        if self.rank:
            return
        model = self.get_model()
        compute = model.compute_logits

        def tapped(*values: Any, **named: Any) -> torch.Tensor:
            logits = compute(*values, **named)
            self.halfbyte_seen.append(logits.detach().clone())
            return logits

        model.compute_logits = tapped

    def halfbyte_keep(self: Any, window: list[int], first: int, path: str) -> list[float] | None:
        """Append the scored rows of the window that was the last prompt to the file.

        Returns:
            Log-probability of each scored token, and the size of the vocabulary; None where the logits are not.
        """
        seen, self.halfbyte_seen = self.halfbyte_seen, []
        if not seen:
            return None
        rows = prompt_rows(seen, len(window))[first : len(window) - 1].float()
        with open(path, "ab") as handle:
            handle.write(rows.cpu().numpy().tobytes())
        targets = torch.tensor(window[first + 1 :], device=rows.device)
        chosen = rows.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return [*chosen.tolist(), float(rows.shape[1])]

    def halfbyte_memory(self: Any) -> list[int]:
        """Bytes of the model's weights on this device, and the most that was allocated there so far."""
        model = self.get_model()
        tensors = {item.data_ptr(): item for item in (*model.parameters(), *model.buffers())}
        weights = sum(item.numel() * item.element_size() for item in tensors.values())
        return [weights, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_process_memory()]


def prompt_rows(seen: list[torch.Tensor], tokens: int) -> torch.Tensor:
    """The rows of logits of a prompt of so many tokens, among all that one request made vLLM compute.

    The row that the next token is sampled from comes first, alone. The prompt's own come after it, at once or in
    chunks; vLLM's older runner leaves the last of them out, which predicts what is not in the prompt.

    Raises:
        RuntimeError: this vLLM does it in another way.
    """
    parts = seen[1:] if len(seen[0]) == 1 else seen
    rows = torch.cat(parts) if parts else seen[0][:0]
    if len(rows) not in (tokens - 1, tokens):
        shapes = [len(part) for part in seen]
        raise RuntimeError(f"expected logits of a prompt of {tokens} tokens, got rows {shapes}")
    return rows


def peak_process_memory() -> int:
    """Most resident bytes of this process so far; 0 where Linux does not say."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as handle:
            return next(1024 * int(line.split()[1]) for line in handle if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def engine() -> Any:
    """The package ``vllm``; importing it takes seconds."""
    return importlib.import_module("vllm")


def send(message: dict[str, Any]) -> None:
    """One line for the process that waits."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def report(job: Job, done: int, total: int, note: str) -> None:
    """Say what is going on."""
    send({"progress": {"stage": job.stage, "done": done, "total": total, "note": note}})


def end_with_parent() -> None:
    """Wait until the process that started this one closes its end of standard input; then end, with all it started."""
    with suppress(OSError):
        while os.read(0, 1):
            pass
    os.killpg(os.getpgrp(), signal.SIGKILL)  # it began a session of its own


def own_words(error: BaseException) -> str:
    """What an exception says, on one line, without the frame that pydantic puts around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "validation error" not in line and "errors.pydantic.dev" not in line]
    text = " ".join(lines).partition(" [type=")[0].removeprefix("Value error, ")
    return text or type(error).__name__


def load(job: Job) -> tuple[Any, float]:
    """The engine, and the seconds that it took to start."""
    settings = {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "trust_remote_code": False,
        "worker_extension_cls": "serve_worker.LogitsTap",
        **job.settings,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        settings.setdefault("gpu_memory_utilization", round(MEMORY_SHARE * free / total, 3))
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor < job.emulated_below:
            settings["linear_backend"] = "emulation"
    elif hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()  # in one process vLLM does not ask Linux for AMX itself; its bf16 kernel needs it
    started = time.perf_counter()
    return engine().LLM(model=job.folder, **settings), time.perf_counter() - started


def keep_logits(llm: Any, job: Job) -> int:
    """Write the logits of all windows; returns the size of the vocabulary.

    Raises:
        RuntimeError: what was taken is not what vLLM scores the text with.
    """
    asked = engine().SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    llm.collective_rpc("halfbyte_tap")
    Path(job.logits_file).write_bytes(b"")
    vocabulary = 0
    for done, window in enumerate(job.windows, start=1):
        answer = llm.generate([{"prompt_token_ids": window}], asked, use_tqdm=False)[0]
        kept = llm.collective_rpc("halfbyte_keep", args=(window, job.first, job.logits_file))
        ours = next(values for values in kept if values is not None)
        vocabulary = int(ours.pop())
        scored = range(job.first + 1, len(window))
        theirs = [answer.prompt_logprobs[at][window[at]].logprob for at in scored]
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if not difference <= LARGEST_DIFFERENCE:
            raise RuntimeError(
                f"logits of window {done} are not those that vLLM scores with, differ by {difference:.3g}"
            )
        report(job, done, len(job.windows), f"window {done}")
    return vocabulary


def time_speed(llm: Any, job: Job, speed: Speed) -> dict[str, Any]:
    """Prompt tokens per second, and generated tokens per second for each number of sequences.

    The time of the first generated token, which is the prompt's, does not count as generation.
    """

    def seconds(prompts: list[list[int]], new_tokens: int) -> float:
        asked = engine().SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
        return time.perf_counter() - started

    def best(prompts: list[list[int]], new_tokens: int) -> float:
        return min(seconds(prompts, new_tokens) for _ in range(speed.runs))

    total = 1 + len(speed.sequences)
    report(job, 0, total, "speed of prompts")
    prompts = random_prompts(speed.prompts, speed.prompt_tokens)
    seconds(prompts, 1)
    prompt_speed = speed.prompts * speed.prompt_tokens / best(prompts, 1)
    generation: dict[str, float] = {}
    for done, count in enumerate(speed.sequences, start=1):
        report(job, done, total, f"speed of {count} sequences")
        short = random_prompts(count, min(16, speed.prompt_tokens))
        seconds(short, WARM_UP_TOKENS)
        spent = best(short, speed.new_tokens) - best(short, 1)
        generation[str(count)] = count * (speed.new_tokens - 1) / max(spent, 1e-9)
    return {"prompt_tokens_per_second": prompt_speed, "generation_tokens_per_second": generation}


def random_prompts(count: int, tokens: int) -> list[list[int]]:
    """Token ids below 256, which every vocabulary has; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (count, tokens), generator=generator).tolist()


def run(job: Job) -> dict[str, Any]:
    """Everything that the job asks for."""
    vllm = engine()
    report(job, 0, 1, f"load in vLLM {vllm.__version__}")
    llm, load_seconds = load(job)
    result: dict[str, Any] = {"version": vllm.__version__, "load_seconds": load_seconds}
    if job.speed is not None:
        result |= time_speed(llm, job, job.speed)
    if job.prompt:
        asked = engine().SamplingParams(
            temperature=0.0, max_tokens=job.max_tokens, stop_token_ids=job.stop, detokenize=False
        )
        answer = llm.generate([{"prompt_token_ids": job.prompt}], asked, use_tqdm=False)[0]
        result["continuation"] = list(answer.outputs[0].token_ids)
    memory = llm.collective_rpc("halfbyte_memory")  # before the logits, which nobody who serves keeps
    result["weight_bytes"] = sum(weights for weights, _ in memory)
    result["peak_memory"] = sum(peak for _, peak in memory)
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if job.windows:
        result["vocabulary"] = keep_logits(llm, job)
    return result


def main() -> None:
    """Read the job, do it, answer."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is in this process where one GPU has it
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it would be compiled first
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    os.environ["NO_COLOR"] = "1"
    if os.name == "posix":
        threading.Thread(target=end_with_parent, daemon=True).start()
    values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    speed = values.pop("speed", None)
    job = Job(**values, speed=Speed(**speed) if speed else None)
    try:
        send({"result": run(job)})
    except KeyboardInterrupt:
        send({"error": "interrupted"})
    except Exception as error:  # noqa: BLE001 (whatever vLLM raises is what the user should read)
        send({"error": own_words(error)})


if __name__ == "__main__":
    main()
