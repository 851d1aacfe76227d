"""Progress for the person at the terminal: a live line, or a plain line now and then when it is not a terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
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
        warnings: what the reader of the result has to know.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._console = Console(file=self._stream)
        self._bar: Bar | None = None
        self._forecast = Forecast()
        self._stage, self._said = "", time.monotonic()
        self.verbose = self.quiet = False
        self.warnings: list[str] = []

    def report(self, progress: Progress) -> None:
        """Show one report."""
        if progress.warning:
            self.warnings.append(progress.note)
            return
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
                TextColumn("{task.fields[times]}  {task.fields[note]}"),
                console=self._console,
            )
            self._bar.start()
        if not self._bar.tasks or (self.verbose and progress.stage != self._stage):
            self._bar.add_task(progress.stage, total=1.0, note="", times="")
        self._stage = progress.stage
        last = self._bar.tasks[-1].id
        note = progress.note if self.verbose else ""
        share = self._forecast.share(now)
        self._bar.update(last, description=progress.stage, completed=share, note=note, times=self._times(now))

    def _times(self, now: float) -> str:
        """Spent and left."""
        spent, left = format_seconds(round(self._forecast.spent(now))), self._forecast.left(now)
        return f"{spent}, {say('{time} left', time=format_seconds(round(left)))}" if left and left >= 1 else spent

    def _plain(self, progress: Progress, now: float) -> None:
        finished, new = progress.done >= progress.total, progress.stage != self._stage
        self._stage = progress.stage
        if now - self._said < PLAIN_SECONDS and not (self.verbose and (finished or new)):
            return
        self._said = now
        note = f": {progress.note}" if self.verbose else ""
        self._stream.write(f"[{100 * self._forecast.share(now):3.0f}%] {progress.stage}{note} ({self._times(now)})\n")
        self._stream.flush()

    def finish(self, *, done: bool = False) -> None:
        """Leave the line as it stands, or as it is when all is done."""
        if self._bar is not None:
            if done:
                spent = format_seconds(round(self._forecast.spent(time.monotonic())))
                self._bar.update(self._bar.tasks[-1].id, completed=1.0, times=spent)
            self._bar.stop()
            self._bar = None
