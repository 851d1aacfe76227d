"""Progress for the person at the terminal: a live line, or a plain line now and then when it is not a terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from halfbyte.core.language import say
from halfbyte.core.progress import Progress
from halfbyte.report.forecast import Forecast
from halfbyte.report.tables import format_seconds

PLAIN_SECONDS = 30.0  # between plain lines


class Drawing:
    """Draws what the library reports.

    Args:
        stream: where to draw; by default standard error, so that results have standard output for themselves.

    Attributes:
        verbose: leave a line of every stage.
        quiet: draw nothing: one of several processes, and not the one that speaks.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._console = Console(file=self._stream)
        self._bar: Bar | None = None
        self._forecast = Forecast()
        self._stage, self._said = "", time.monotonic()
        self.verbose = self.quiet = False

    def report(self, progress: Progress) -> None:
        """Show one report."""
        now = time.monotonic()
        self._forecast.note(progress, now)
        if self.quiet:
            return
        if self._console.is_terminal:
            self._live(progress, now)
        else:
            self._plain(progress, now)

    def _live(self, progress: Progress, now: float) -> None:
        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}  {task.fields[note]}"),
                console=self._console,
            )
            self._bar.start()
        if not self._bar.tasks or (self.verbose and progress.stage != self._stage):
            self._bar.add_task(progress.stage, total=1.0, note="", left="")
        self._stage = progress.stage
        last = self._bar.tasks[-1].id
        share, left = self._forecast.share(now), self._left(now)
        note = progress.note if self.verbose else ""
        self._bar.update(last, description=progress.stage, completed=share, note=note, left=left)

    def _left(self, now: float) -> str:
        left = self._forecast.left(now)
        return "" if left is None else say("{time} left", time=format_seconds(round(left)))

    def _plain(self, progress: Progress, now: float) -> None:
        finished, new = progress.done >= progress.total, progress.stage != self._stage
        self._stage = progress.stage
        if now - self._said < PLAIN_SECONDS and not (self.verbose and (finished or new)):
            return
        self._said = now
        times = ", ".join(filter(None, (format_seconds(round(self._forecast.spent(now))), self._left(now))))
        note = f": {progress.note}" if self.verbose else ""
        self._stream.write(f"[{100 * self._forecast.share(now):3.0f}%] {progress.stage}{note} ({times})\n")
        self._stream.flush()

    def finish(self) -> None:
        """Leave the line as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
