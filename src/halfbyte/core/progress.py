"""How the library says what it is doing, without printing anything itself: whoever wants to know listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report: ``done`` of ``total`` steps of ``stage`` are finished.

    Attributes:
        note: what to show beside it.
        warning: the note is no progress, but something that the reader of the result has to know.
        expected: foretold, if this report foretells something: stage -> seconds that it will take, in their order.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    expected: Mapping[str, float] | None = None
    warning: bool = False


Listener = Callable[[Progress], None]
_listeners: list[Listener] = []


def report(stage: str, done: int, total: int, note: str = "", expected: Mapping[str, float] | None = None) -> None:
    """Tell whoever listens that ``done`` of ``total`` steps of ``stage`` are finished."""
    tell(Progress(stage, done, total, " ".join(note.split()), expected))


def warn(note: str) -> None:
    """Tell whoever listens what the reader of the result has to know."""
    tell(Progress("note", 1, 1, " ".join(note.split()), warning=True))


def tell(progress: Progress) -> None:
    """Hand a report to whoever listens."""
    if _listeners:
        _listeners[-1](progress)


def told() -> Listener | None:
    """Who listens at the moment."""
    return _listeners[-1] if _listeners else None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` is told what the library does; the one that was told before has a pause."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()
