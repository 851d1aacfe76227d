"""What a search minimises, as scores of many genomes at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from halfbyte.models.layers import Unit
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.priced import Offer
from halfbyte.search.problem import Genome
from halfbyte.search.racing import ANCHORS, race
from halfbyte.search.sensitivity import LayerSensitivity, unit_errors


class Fitness(ABC):
    """Scores genomes; lower is better.

    Attributes:
        work: how much of scoring a genome whole has been done so far, in genomes.
        tick: called now and then while it goes on.
    """

    work = 0.0
    tick: Callable[[], None] = staticmethod(lambda: None)

    @abstractmethod
    def score(self, genome: Genome) -> float:
        """The whole score of one genome."""

    @abstractmethod
    def gains(self, report: Callable[[int], None]) -> list[float]:
        """What each unit gains by A8 on its own; ``report`` is told how many units are done."""

    def scores(
        self, genomes: Sequence[Genome], incumbent: Genome | None, known: Sequence[Genome]
    ) -> tuple[dict[Genome, float], dict[Genome, float]]:
        """Scores to compare ``genomes`` by, and the share of the text that each was measured on.

        Args:
            incumbent: the best genome so far.
            known: genomes that were measured whole, oldest first.
        """
        return {genome: self.score(genome) for genome in genomes}, dict.fromkeys(genomes, 1.0)


class PricedEvaluator:
    """An evaluator of whole genomes that takes those of an offer, and adds what their time costs beyond the limit.

    A genome that is exactly as fast as the limit scores what it loses.
    """

    def __init__(self, evaluator: KLEvaluator, offer: Offer) -> None:
        self.evaluator, self.offer = evaluator, offer
        self.windows, self.length = evaluator.windows, evaluator.length

    @property
    def tokens_run(self) -> float:
        """See :class:`halfbyte.search.evaluator.KLEvaluator`."""
        return self.evaluator.tokens_run

    @property
    def tick(self) -> Callable[[], None]:
        """See :class:`halfbyte.search.evaluator.KLEvaluator`."""
        return self.evaluator.tick

    @tick.setter
    def tick(self, value: Callable[[], None]) -> None:
        self.evaluator.tick = value

    def losses(self, genomes: Sequence[Genome], windows: Iterable[int] | None = None) -> np.ndarray:
        """Mean KL per segment and the price, ``[genomes, windows, segments]``."""
        found = self.evaluator.losses([self.offer.whole(genome) for genome in genomes], windows)
        extra = [self.offer.price * (self.offer.time(genome) - 1) for genome in genomes]
        return found + np.array(extra).reshape(-1, 1, 1)

    def score(self, genome: Genome) -> float:
        """Mean over all windows."""
        return float(self.losses([genome]).mean())


class KLFitness(Fitness):
    """KL of the whole model, on few tokens for every candidate and on more for those that could still win.

    Args:
        stages: windows of text after which candidates are compared, ascending; the last is all of them.
    """

    def __init__(self, evaluator: KLEvaluator | PricedEvaluator, stages: Sequence[int]) -> None:
        self.evaluator, self.stages = evaluator, tuple(stages)
        evaluator.tick = lambda: self.tick()

    @property
    def work(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.evaluator.tokens_run / (self.evaluator.windows * self.evaluator.length)

    def score(self, genome: Genome) -> float:
        return self.evaluator.score(genome)

    def gains(self, report: Callable[[int], None]) -> list[float]:
        assert isinstance(self.evaluator, KLEvaluator)
        base = self.evaluator.score((8,) * len(self.evaluator.units))
        found = []
        for loss in self.evaluator.one_at_a_time(8, 4):
            found.append(loss - base)
            report(len(found))
        return found

    def scores(
        self, genomes: Sequence[Genome], incumbent: Genome | None, known: Sequence[Genome]
    ) -> tuple[dict[Genome, float], dict[Genome, float]]:
        raced = race(genomes, incumbent, self.evaluator.losses, self.stages, anchors=known[-ANCHORS:])
        whole = self.stages[-1]
        return (
            {genome: result.score for genome, result in raced.items()},
            {genome: result.windows / whole for genome, result in raced.items()},
        )


class TableFitness(Fitness):
    """A sum over units of what each adds (``mse``, ``fisher``); see :func:`halfbyte.search.sensitivity.unit_errors`."""

    def __init__(self, units: Sequence[Unit], rows: Mapping[str, LayerSensitivity], name: str) -> None:
        self.tables = unit_errors(units, rows, name)

    def score(self, genome: Genome) -> float:
        return sum(table[bits] for table, bits in zip(self.tables, genome, strict=True))

    def gains(self, report: Callable[[int], None]) -> list[float]:
        return [table[4] - table[8] for table in self.tables]


def stages_of(windows: int) -> tuple[int, ...]:
    """A quarter, half and all of the windows: where a race compares."""
    return tuple(sorted({max(1, windows // 4), max(1, windows // 2), windows}))
