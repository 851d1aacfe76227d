"""Progress for the person at the terminal: a live bar, or a plain line now and then when it is not a terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from halfbyte.core.progress import Progress

PLAIN_SECONDS = 10.0  # between plain lines of one stage


class Drawing:
    """Draws what the library reports, and adds up the time of its stages.

    Args:
        stream: where to draw; by default standard error, so that results have standard output for themselves.

    Attributes:
        seconds: spent in each stage so far.
        quiet: draw nothing: one of several processes, and not the one that speaks.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._console = Console(file=self._stream)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._started = self._said = time.monotonic()
        self._since = self._started
        self.seconds: dict[str, float] = {}
        self.quiet = False

    def report(self, progress: Progress) -> None:
        """Show one report."""
        now = time.monotonic()
        self.seconds[progress.stage] = self.seconds.get(progress.stage, 0.0) + now - self._since
        self._since = now
        if self.quiet:
            return
        if self._console.is_terminal:
            self._live(progress)
        else:
            self._plain(progress)

    def _live(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._bar.start()
        if progress.stage != self._stage or self._task is None:
            self._stage = progress.stage
            self._task = self._bar.add_task(progress.stage, total=progress.total, note=progress.note)
        self._bar.update(self._task, completed=progress.done, total=progress.total, note=progress.note)

    def _plain(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._started, self._said = progress.stage, now, 0.0
        finished = progress.done >= progress.total
        if finished or now - self._said >= PLAIN_SECONDS:
            self._said = now
            spent = now - self._started
            left = spent / progress.done * (progress.total - progress.done) if progress.done else None
            when = f"{spent:.0f} s" if finished or left is None else f"{spent:.0f} s, {left:.0f} s left"
            share = f"{100 * progress.done / max(progress.total, 1):3.0f}%"
            self._stream.write(f"[{share}] {progress.stage}: {progress.note} ({when})\n")
            self._stream.flush()

    def finish(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
