"""Which device and number format to compute in, and how much memory there is."""

from __future__ import annotations

import psutil
import torch

from halfbyte.core.environment import cpu_name, peak_process_memory
from halfbyte.core.errors import HalfbyteError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """``auto`` means cuda, then mps, then cpu.

    Raises:
        HalfbyteError: the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name.partition(":")[0], False):
        there = ", ".join(device for device, here in available.items() if here)
        raise HalfbyteError(
            f"--device: device is not available, expected {there}, got {name}", fix="pass --device auto"
        )
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` means bf16 on an accelerator and fp32 on a CPU; fp16 is never used (Qwen2.5 overflows it)."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had allocated on ``device`` so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_process_memory()


def device_name(device: torch.device) -> str:
    """The device in words, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (MPS)"
    return f"{cpu_name()} ({torch.get_num_threads()} threads)"
