"""The kinds of hardware that engines tell apart, and which of them this machine is."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from halfbyte.core.errors import HalfbyteError


@dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Attributes:
        key: what ``--hardware`` takes, e.g. ``sm89`` or ``cpu-amx``.
        name: for people.
        capability: CUDA compute capability without its dot; 0 if it is no CUDA device.
    """

    key: str
    name: str
    capability: int = 0

    @property
    def is_cpu(self) -> bool:
        """Whether it is a processor."""
        return self.key.startswith("cpu")


_GPUS = (
    (75, "Turing (T4, RTX 20)"),
    (80, "Ampere (A100, A800, A30)"),
    (86, "Ampere (A10, A40, RTX 30)"),
    (87, "Ampere (Orin)"),
    (89, "Ada (L4, L40, RTX 40)"),
    (90, "Hopper (H100, H200)"),
    (100, "Blackwell (B200)"),
    (103, "Blackwell (B300)"),
    (110, "Blackwell (Thor)"),
    (120, "Blackwell (RTX 50, RTX PRO)"),
    (121, "Blackwell (GB10)"),
)
HARDWARE = {
    entry.key: entry
    for entry in (
        *(Hardware(f"sm{capability}", name, capability) for capability, name in _GPUS),
        Hardware("rocm", "AMD GPU"),
        Hardware("cpu-amx", "x86 CPU with AMX"),
        Hardware("cpu-avx512", "x86 CPU with AVX-512, without AMX"),
        Hardware("cpu-avx2", "x86 CPU without AVX-512"),
        Hardware("cpu-arm", "Arm CPU"),
        Hardware("mps", "Apple GPU"),
    )
}


def named(key: str) -> Hardware:
    """The hardware called ``key``.

    Raises:
        HalfbyteError: there is no such key.
    """
    if key not in HARDWARE:
        raise HalfbyteError("unknown hardware", where="--hardware", expected=f"auto or {', '.join(HARDWARE)}", got=key)
    return HARDWARE[key]


def this_machine(device: torch.device) -> Hardware:
    """The hardware of ``device``; a CUDA capability that is not in the list is itself."""
    if device.type == "cuda":
        if torch.version.hip:
            return HARDWARE["rocm"]
        major, minor = torch.cuda.get_device_capability(device)
        key = f"sm{major}{minor}"
        return HARDWARE.get(key) or Hardware(key, torch.cuda.get_device_name(device), 10 * major + minor)
    return HARDWARE["mps"] if device.type == "mps" else this_cpu()


def this_cpu() -> Hardware:
    """Which of the processors; asked of PyTorch in the way vLLM asks."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return HARDWARE["cpu-arm"]
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return HARDWARE["cpu-amx"]
    wide = getattr(torch.cpu, "_is_avx512_supported", lambda: False)()
    return HARDWARE["cpu-avx512" if wide else "cpu-avx2"]
