"""How long the stages of a command take, and how much memory: measured from what it reports while it works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from halfbyte.core.environment import peak_memory, start_peak_again
from halfbyte.core.progress import Progress, listening, told

if TYPE_CHECKING:
    import torch


@dataclass
class Stage:
    """What one stage took.

    Attributes:
        seconds: until its last report, without the stages before it.
        host: most bytes of main memory that the process held at one of its reports, pages of mapped files included.
        device: most bytes allocated on a CUDA device; None on others.
    """

    seconds: float = 0.0
    host: int = 0
    device: int | None = None


class Stages:
    """The stages so far, by name, in their order.

    Args:
        device: whose memory is watched. Its peak is counted anew for every stage.
    """

    def __init__(self, device: torch.device) -> None:
        self.stages: dict[str, Stage] = {}
        self._device, self._process, self._since = device, psutil.Process(), time.monotonic()
        start_peak_again(device)  # of earlier work

    def note(self, progress: Progress) -> None:
        """Count what went by since the last report to this one's stage."""
        if progress.warning:
            return
        now, stage = time.monotonic(), self.stages.setdefault(progress.stage, Stage())
        stage.seconds += now - self._since
        stage.host = max(stage.host, self._process.memory_info().rss)
        if self._device.type == "cuda":
            stage.device = max(stage.device or 0, peak_memory(self._device))
            start_peak_again(self._device)
        self._since = now

    @property
    def peak_memory(self) -> int:
        """Most bytes allocated on the device; on a CPU, that the process held."""
        return max(peak_memory(self._device), *(stage.device or 0 for stage in self.stages.values()))


@contextmanager
def watched(device: torch.device) -> Iterator[Stages]:
    """Inside, stages are measured; whoever listened before is told as before."""
    found, before = Stages(device), told()

    def note(progress: Progress) -> None:
        found.note(progress)
        if before is not None:
            before(progress)

    with listening(note):
        yield found
