"""The machine this process runs on: cores, memory, devices and number formats to compute in, the model hub.

torch is imported where a device is asked about, and not before: small workers use the rest without it.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from urllib.request import getproxies

import psutil

from halfbyte.core.errors import HalfbyteError

if TYPE_CHECKING:
    import torch

TIMEOUT_SECONDS = 3.0  # to reach the model hub
ALLOCATOR, GROWING_SEGMENTS = "PYTORCH_ALLOC_CONF", "expandable_segments:True"


def use_growing_segments() -> None:
    """Let PyTorch leave fewer gaps in GPU memory, which 7B needs on 8 GB; only before it is imported.

    What the user has set stays.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault(ALLOCATOR, GROWING_SEGMENTS)


def variables_of_others() -> dict[str, str]:
    """Environment variables for a program that is not ours, without :func:`use_growing_segments`.

    On two GPUs vLLM 0.26 ended with those, where it ran without: its processes share memory.
    """
    own = {ALLOCATOR} if os.environ.get(ALLOCATOR) == GROWING_SEGMENTS else set()
    return {name: value for name, value in os.environ.items() if name not in own}


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_process_memory() -> int:
    """Most resident bytes that this process has had so far, on Linux, macOS and Windows."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # ru_maxrss would start at the parent's size: exec keeps it, a new address space not
        with open("/proc/self/status", encoding="ascii", errors="replace") as handle:
            return next(1024 * int(line.split()[1]) for line in handle if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def resolve_device(name: str) -> torch.device:
    """``auto`` means cuda, then mps, then cpu.

    Raises:
        HalfbyteError: the device asked for is not there.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name.partition(":")[0], False):
        there = ", ".join(device for device, here in available.items() if here)
        raise HalfbyteError(
            f"--device: device is not available, expected {there}, got {name}", fix="pass --device auto"
        )
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:  # where Triton launches, and what counters are asked for
        torch.cuda.set_device(device)
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` means bf16 on an accelerator and fp32 on a CPU; fp16 is never used (Qwen2.5 overflows it)."""
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(_index(device)) * total)
        return min(free, allowed - torch.cuda.memory_allocated(device))
    return psutil.virtual_memory().available


def limit_memory(device: torch.device, nbytes: int) -> None:
    """Let PyTorch allocate no more than that on a CUDA device.

    Raises:
        HalfbyteError: another device.
    """
    import torch

    if device.type != "cuda":
        raise HalfbyteError(f"--device_memory: only for a GPU with CUDA, got {device.type}", fix="leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), _index(device))


def _index(device: torch.device) -> int:
    """The number of a CUDA device; of ``cuda`` alone, the current one's."""
    import torch

    return torch.cuda.current_device() if device.index is None else device.index


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had allocated on ``device`` so far."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_process_memory()


def start_peak_again(device: torch.device) -> None:
    """From here on :func:`peak_memory` is of what comes; on a GPU, where else there is no such counter."""
    import torch

    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)


def device_name(device: torch.device) -> str:
    """The device in words, for reports."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (MPS)"
    return f"{cpu_name()} ({torch.get_num_threads()} threads)"


@cache
def reachable() -> bool:
    """False when offline mode is set or no connection can be opened; behind a proxy only the proxy is asked."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    proxies = getproxies()
    address = urlparse(
        proxies.get("https") or proxies.get("all") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    )
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=TIMEOUT_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True
