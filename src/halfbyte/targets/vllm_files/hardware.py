"""Which GPU a plan is for: generations and compute capabilities, as ``--hardware`` names them."""

from __future__ import annotations

import torch

from halfbyte.core.errors import HalfbyteError

GENERATIONS = {"turing": 75, "ampere": 80, "ada": 89, "hopper": 90, "blackwell": 100}
CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def capability_of(hardware: str) -> int:
    """The compute capability times ten that ``--hardware`` stands for.

    Args:
        hardware: ``auto``, which is this machine's first GPU, a generation, or ``sm75`` to ``sm121``.

    Raises:
        HalfbyteError: it is unknown, or there is no such GPU here.
    """
    names = ", ".join([*GENERATIONS, *(f"sm{capability}" for capability in CAPABILITIES)])
    if hardware == "auto":
        if not torch.cuda.is_available():
            raise HalfbyteError(
                "--hardware: which GPU will vLLM run on? This machine has none to take as an example",
                fix=f"name it: {names}",
            )
        major, minor = torch.cuda.get_device_capability()
        hardware = f"sm{10 * major + minor}"
    wanted = hardware.strip().lower()
    capability = GENERATIONS.get(wanted)
    if capability is None and wanted.startswith("sm") and wanted[2:].isdigit():
        capability = int(wanted[2:])
    if capability not in CAPABILITIES:
        raise HalfbyteError(f"--hardware: unknown GPU, expected auto, {names}, got {hardware}")
    return capability
