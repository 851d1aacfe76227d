"""How the library tells the command line what it is doing, without printing anything itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report: ``done`` of ``total`` steps of ``stage`` are finished; ``note`` is what to show beside it."""

    stage: str
    done: int
    total: int
    note: str = ""


Reporter = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A reporter for callers who do not want to know."""
