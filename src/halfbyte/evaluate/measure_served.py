"""Measure a model folder in vLLM: logits of windows, and on request speed and a sample text.

vLLM has an environment of its own, because it asks for other versions than we do; its Python runs
``engines/served/serve_worker.py``, and what vLLM said about its kernels is read from its messages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from packaging.version import Version
from pydantic import Field
from transformers import PretrainedConfig

from halfbyte.calibration.text import first_scored, scored_tokens
from halfbyte.core.environment import variables_of_others
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import MANIFEST, check_space, scratch_folder
from halfbyte.core.schema import parsed, read_json
from halfbyte.engines.served import serve_worker
from halfbyte.engines.served.serve_worker import Job, Speed
from halfbyte.evaluate.quality import prompt_ids
from halfbyte.evaluate.worker import Measured, WorkerError, run_command
from halfbyte.models.loading import load_tokenizer

TESTED = "0.26.0"  # vLLM
VARIABLE = "HALFBYTE_SERVE_PYTHON"
INSTALL = (
    f"python -m venv serve, serve/bin/python -m pip install vllm=={TESTED}, and pass --serve_python serve/bin/python "
    f"or set {VARIABLE}"
)
KERNEL = re.compile(
    r"(?:Using|Selected) (?:\w+Kernel for \w[\w -]*|\w+ for (?:CompressedTensors\w+|[\w -]*(?:GEMM|LinearMethod)))"
)
ROOT_CAUSE = re.compile(r"(?:^|\s)(\w*(?:Error|Exception)): (.+)")
ELSEWHERE = ("root cause", "cancelled")  # vLLM's words for an error of another of its processes
CACHE_BYTES = 2 << 30  # of keys and values, on each GPU: 32,768 tokens of a 7B model with four key heads
ASK = (  # prints the version if there is one, and fails without vLLM
    "import importlib.metadata as m, importlib.util, sys\n"
    "print(next((d.version for d in m.distributions(name='vllm')), ''))\n"
    "sys.exit(importlib.util.find_spec('vllm') is None)"
)
ASK_SECONDS = 120
SPEED_TOKENS = 64  # generated tokens that are timed
# CUDA graphs of steps that only generate, nothing compiled: starts in seconds and generates at full speed.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
SAME = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")  # of a model and its quantised folder


@dataclass(frozen=True)
class FolderRecord:
    """What the export notes beside the names of the files.

    Attributes:
        fingerprint, plan, text_search: of the model, of the plan, and of the text of its search.
        vllm: the first version that runs the folder.
        emulated_below: see :class:`~halfbyte.engines.served.serve_worker.Job`.
    """

    fingerprint: str | None = None
    plan: str | None = None
    text_search: str | None = None
    vllm: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")] | None = None
    emulated_below: int = 0


@dataclass(frozen=True)
class ServedRequest:
    """One folder to measure.

    Attributes:
        folder, stage: the model, and what progress calls it.
        python: that has vLLM, from :func:`serve_python`.
        windows, ctx: tokens to score, and how many there are in each window.
        logits_file: where the logits go.
        tensor_parallel: GPUs that share every layer.
        trust_remote_code: run code that the folder brings along.
        prompt, max_tokens: of the sample text; 0 tokens: neither sample nor speed.
    """

    folder: str
    stage: str
    python: str
    windows: list[list[int]]
    ctx: int
    logits_file: str
    tensor_parallel: int = 1
    trust_remote_code: bool = False
    prompt: str = ""
    max_tokens: int = 0


def serve_python(given: str | None, folder: str | None = None) -> str:
    """The Python that has vLLM: the one that was named, this one, or the one of ``HALFBYTE_SERVE_PYTHON``.

    Args:
        folder: that it is to run, if it says which vLLM it needs.

    Raises:
        HalfbyteError: none of them has it, or an older one than the folder needs.
    """
    named = given or os.environ.get(VARIABLE)
    where = "--served"
    if given is None and importlib.util.find_spec("vllm"):
        python = sys.executable
        version = next((found.version for found in importlib.metadata.distributions(name="vllm")), "")
    elif not named:
        raise HalfbyteError("--served: vLLM is not installed in this Python", fix=INSTALL)
    else:
        where = "--serve_python" if given else VARIABLE
        python = shutil.which(os.path.expanduser(named))
        if python is None:
            raise HalfbyteError(f"{where}: no such Python, got {named}", fix=INSTALL)
        version = _version_of_vllm(python)
        if version is None:
            raise HalfbyteError(f"{where}: vLLM is not installed there, got {named}", fix=INSTALL)
    needed = record_of(folder).vllm if folder else None
    if needed and version and Version(version) < Version(needed):
        raise HalfbyteError(
            f"{where}: vLLM is too old for {folder}, expected {needed} or newer, got {version}",
            fix=f"install it in an environment of its own: pip install 'vllm>={needed}'",
        )
    return python


def _version_of_vllm(python: str) -> str | None:
    """The version that a Python has, "" if it does not say, None if it has none or is no Python."""
    try:
        asked = subprocess.run([python, "-c", ASK], capture_output=True, timeout=ASK_SECONDS)
        version = asked.stdout.decode().strip()
        return None if asked.returncode else version and str(Version(version))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def check_folder(folder: str) -> None:
    """Refuse what is no model folder.

    Raises:
        HalfbyteError: saying what was expected.
    """
    if not (Path(folder) / "config.json").is_file():
        raise HalfbyteError(
            f"{folder}: no such model, expected a folder with a config.json", fix="make one with halfbyte export vllm"
        )


def check_same_shape(folder: str, reference: PretrainedConfig, model_id: str) -> None:
    """Refuse, before anything is loaded, a folder whose shape is not the reference's.

    Raises:
        HalfbyteError: naming the first difference.
    """
    config = read_json(Path(folder) / "config.json", "model configuration")
    for key in SAME:
        expected = getattr(reference, key, None)
        if key in config and expected is not None and config[key] != expected:
            raise HalfbyteError(
                f"{folder}: the folder is of another model than {model_id}, expected {key} {expected}, "
                f"got {config[key]}",
                fix="pass its original with --model_id",
            )


def record_of(folder: str) -> FolderRecord:
    """What the export noted of the folder; nothing for other folders."""
    path = Path(folder) / MANIFEST
    return (
        parsed(FolderRecord, read_json(path, "record of the export"), where=path) if path.is_file() else FolderRecord()
    )


def measure_served(request: ServedRequest) -> Measured:
    """Measure in vLLM's own process.

    Raises:
        HalfbyteError: vLLM's own words if it refuses the folder, or the disk is full.
    """
    tokenizer: Any = load_tokenizer(request.folder, where=request.folder)
    prompt = prompt_ids(tokenizer, request.prompt) if request.max_tokens else []
    vocabulary = read_json(Path(request.folder) / "config.json", "model configuration").get("vocab_size", 0)
    check_space(request.logits_file, 4 * len(request.windows) * scored_tokens(request.ctx) * vocabulary)
    job = Job(
        folder=request.folder,
        stage=request.stage,
        settings=_settings(request, len(prompt)),
        windows=request.windows,
        first=first_scored(request.ctx),
        logits_file=request.logits_file,
        speed=Speed(1, request.ctx, [1], SPEED_TOKENS) if request.max_tokens else None,
        prompt=prompt,
        max_tokens=request.max_tokens,
        stop=[tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else [],
        emulated_below=record_of(request.folder).emulated_below,
    )
    result, kernels = run_job(job, request.python)
    speeds = {}
    if job.speed is not None:
        speeds = {
            "prompt_tokens_per_second": result["prompt_tokens_per_second"],
            "generation_tokens_per_second": result["generation_tokens_per_second"]["1"],
            "sample": tokenizer.decode(result["continuation"], skip_special_tokens=True).strip(),
        }
    gpus = f", {request.tensor_parallel} GPUs" if request.tensor_parallel > 1 else ""
    return Measured(
        engine=f"vLLM {result['version']} ({result['device']}{gpus})",
        bytes=sum(file.stat().st_size for file in Path(request.folder).glob("*.safetensors")),
        load_seconds=result["load_seconds"],
        peak_memory=result["peak_memory"],
        windows=request.windows,
        vocab=result["vocabulary"],
        logits_file=request.logits_file,
        fingerprint=record_of(request.folder).fingerprint,
        kernels=kernels,
        **speeds,
    )


def _settings(request: ServedRequest, prompt_tokens: int) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``; a window is one prompt and one step."""
    longest = max(request.ctx + SPEED_TOKENS, prompt_tokens + request.max_tokens) if request.max_tokens else request.ctx
    speed = {"compilation_config": {**GRAPHS, "cudagraph_capture_sizes": [1]}}
    return {
        "max_model_len": longest + 1,
        "max_num_batched_tokens": max(2048, longest + 1),
        "max_num_seqs": 1,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "tensor_parallel_size": request.tensor_parallel,
        "trust_remote_code": request.trust_remote_code,
        **(speed if request.max_tokens else {"enforce_eager": True}),
    }


def run_job(job: Job, python: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Run one job in a process of its own.

    Returns:
        Its result, and what vLLM said about the kernels that it chose.

    Raises:
        HalfbyteError: vLLM's own words.
    """
    with scratch_folder() as scratch:
        path = scratch / "job.json"
        absolute = replace(job, folder=os.path.abspath(job.folder))  # vLLM takes a short path for a hub id
        path.write_text(json.dumps(asdict(absolute)), encoding="utf-8")
        try:
            command = [python, str(Path(serve_worker.__file__)), str(path)]
            result, said = run_command(command, where=job.folder, environment=variables_of_others())
        except WorkerError as error:
            raise HalfbyteError(f"{job.folder}: vLLM does not run it, got {cause(error)}") from error
    return result, tuple(dict.fromkeys(KERNEL.findall(said)))


def cause(error: WorkerError) -> str:
    """The engine's own words; where it only says that another process failed, those of that process."""

    def elsewhere(text: str) -> bool:
        return any(word in text for word in ELSEWHERE)

    if not elsewhere(error.text):
        return error.text[:300]
    causes = [found for found in ROOT_CAUSE.findall(error.said) if not elsewhere(found[1])]
    return ": ".join(causes[-1])[:300] if causes else f"one of its processes ended, {error.text[:300]}"
