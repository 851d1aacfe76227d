"""The simulation in PyTorch: any transform, asymmetric activation codes; nothing is exported."""

from __future__ import annotations

from typing import ClassVar

from halfbyte.targets import Target


class Simulation(Target):
    """Runs where PyTorch runs."""

    name = "sim"
    runs_online: ClassVar = frozenset({"r4", "online", "learned"})
    best = "smooth,rotate,learned"

    def rotations(self, *, tied: bool) -> tuple[str, ...]:
        return ("online",)  # smoothing stays possible everywhere


TARGET = Simulation()
