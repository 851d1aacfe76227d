"""(1+λ) evolution: every generation is λ changed copies of the best genome so far. A baseline for the search.

The scheme of EvoPress (Sieberling et al., "EvoPress: accurate dynamic model compression via evolutionary search",
ICML 2025, arXiv:2410.14649): a copy differs by a few swaps, each of which lowers one unit and raises another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from halfbyte.search.asktell import ATTEMPTS, AskTell, Stopping
from halfbyte.search.baselines import random_genome
from halfbyte.search.space import Genome, SearchSpace


@dataclass(frozen=True)
class EvolutionSettings(Stopping):
    """How the search runs. At most ``seeds + generations * offspring`` genomes are scored.

    Attributes:
        generations, patience, tolerance: when the search ends (:class:`.asktell.Stopping`).
        offspring: λ, genomes per generation; also of generation 0 when there are no seeds.
        swaps: mean number of swaps that make a child; the number is geometric, at least one.

    Raises:
        HalfbyteError: a value is out of range.
    """

    offspring: int = 28
    swaps: float = 2.0

    NAME: ClassVar[str] = "evolution"


class Evolution(AskTell[EvolutionSettings]):
    """One parent, λ children, the best of all is the next parent.

    Args:
        problem: units, levels, budget; what its units want steers repair and fill only.
        settings: how the search runs.
        rng: from ``np.random.default_rng(seed)``; the search owns it from here on.
        seeds: genomes to start from, repaired and filled; without any, λ random ones.

    Raises:
        HalfbyteError: a seed is not a genome of the problem, or the generator's state cannot be saved.
    """

    def __init__(
        self, problem: SearchSpace, settings: EvolutionSettings, rng: np.random.Generator, seeds: Iterable[Genome] = ()
    ) -> None:
        super().__init__(problem, settings, rng, seeds, limit=settings.offspring * (settings.generations + 1))

    def _start(self, seeds: list[Genome]) -> list[Genome]:
        """Generation 0: the seeds, else random genomes, each once."""
        return list(
            dict.fromkeys(seeds or [random_genome(self.problem, self._rng) for _ in range(self.settings.offspring)])
        )

    def _survivors(self, candidates: list[Genome]) -> list[Genome]:
        return [self.best[0]]

    def _breed(self) -> list[Genome]:
        """λ unscored children of the best genome, fewer when swaps find no more."""
        parent = self.best[0]
        children: dict[Genome, None] = {}
        for _ in range(self.settings.offspring):
            for attempt in range(ATTEMPTS):
                child = self._mutate(parent, extra=attempt // 2)  # ever wider where the neighbours are known
                if child not in self.scores and child not in children:
                    children[child] = None
                    break
        unknown = [genome for genome in self._space or () if genome not in self.scores and genome not in children]
        for place in self._rng.permutation(len(unknown))[: self.settings.offspring - len(children)].tolist():
            children[unknown[place]] = None
        return list(children)

    def _mutate(self, parent: Genome, extra: int = 0) -> Genome:
        """Raise k units by one level and lower k others, then repair and fill; k is geometric, plus ``extra``."""
        problem, rng = self.problem, self._rng
        levels = problem.levels(parent)
        raisable, lowerable = np.flatnonzero(levels < problem.tops), np.flatnonzero(levels > 0)
        swaps = int(rng.geometric(1 / self.settings.swaps)) + extra
        for units, step in ((raisable, 1), (lowerable, -1)):
            levels[rng.permutation(units)[:swaps]] += step
        return problem.fill(problem.repair(problem.of_levels(levels), rng), rng)
