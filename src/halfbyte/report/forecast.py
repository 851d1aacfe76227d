"""How much of a command is done, and how long the rest takes: from what was foretold of its stages, and how they go."""

from __future__ import annotations

from halfbyte.core.progress import Progress

KNOWN = 0.1  # of a stage that must be done before its own pace says how long it takes


class Forecast:
    """Follows reports. Where no stages were foretold, it knows of the stage at hand alone.

    A stage's own pace says what is left of it; for stages that have not begun, what was foretold counts, times how much
    longer or shorter than foretold the others took.
    """

    def __init__(self) -> None:
        self._expected: dict[str, float] = {}  # stage -> seconds
        self._shares: dict[str, float] = {}  # stage -> how much of it is done
        self._seconds: dict[str, float] = {}  # stage -> spent in it so far
        self._stage = ""
        self._started = self._since = None

    def note(self, progress: Progress, now: float) -> None:
        """One report, at a time in seconds of any clock."""
        if self._started is None or self._since is None:
            self._started = self._since = now
        if progress.expected is not None:
            self._expected = dict(progress.expected)
            self._shares, self._seconds, self._since, self._started = {}, {}, now, now
            return
        stage = progress.stage
        if stage in self._expected and stage not in self._shares:
            for earlier in self._expected:
                if earlier == stage:
                    break
                self._shares[earlier] = 1.0  # done, or kept from an interrupted run
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
        self._shares[stage] = max(self._shares.get(stage, 0.0), progress.done / max(1, progress.total))
        self._stage, self._since = stage, now

    def spent(self, now: float) -> float:
        """Seconds since the first report, or since the stages were foretold."""
        return 0.0 if self._started is None else now - self._started

    def left(self, now: float) -> float | None:
        """Seconds; None if nobody knows."""
        own = self._rest_of(self._stage)
        if not self._expected:
            return own
        done = [name for name in self._expected if self._shares.get(name) == 1.0 and name in self._seconds]
        foretold, took = sum(self._expected[name] for name in done), sum(self._seconds[name] for name in done)
        pace = took / foretold if foretold > KNOWN * sum(self._expected.values()) else 1.0
        rest = 0.0 if own is None or self._stage in self._expected else own
        for name, seconds in self._expected.items():
            known = self._rest_of(name)
            rest += seconds * pace * (1 - self._shares.get(name, 0.0)) if known is None else known
        return max(0.0, rest - (now - (self._since or now)))

    def _rest_of(self, stage: str) -> float | None:
        """By the stage's own pace; None if too little of it is done."""
        share = self._shares.get(stage, 0.0)
        return self._seconds[stage] * (1 - share) / share if share > KNOWN and stage in self._seconds else None

    def share(self, now: float) -> float:
        """How much is done, 0 to 1."""
        left = self.left(now)
        if not self._expected or left is None:
            return self._shares.get(self._stage, 0.0)
        spent = self.spent(now)
        return spent / max(spent + left, 1e-9)
