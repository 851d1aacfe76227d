"""A genetic algorithm that proposes genomes and leaves the scoring to someone else (see :mod:`.asktell`).

Some children are bred from good parents, the others come from a model of what the scores say so far
(:mod:`.surrogate`): the model knows where the optimum should be, breeding finds what the model cannot express.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from halfbyte.search.asktell import ATTEMPTS, AskTell, Stopping
from halfbyte.search.baselines import random_genome
from halfbyte.search.space import Genome, SearchSpace
from halfbyte.search.surrogate import proposals


@dataclass(frozen=True)
class GeneticSettings(Stopping):
    """How the search runs.

    At most ``population + generations * (population - elite)`` genomes are scored.

    Attributes:
        generations, patience, tolerance: when the search ends (:class:`.asktell.Stopping`).
        population: genomes per generation.
        elite: best genomes that pass unchanged into the next generation; fewer where that would leave no child.
        tournament: genomes drawn to find one parent; the best of them wins.
        crossover_rate: probability that a child has two parents instead of one.
        mutation_rate: mean probability that a unit of a child changes its level; None is 1 / number of units.
        model_share: share of the children that the surrogate proposes instead of parents; 0 is without a model. A
            problem without a line (activation bits with more than two choices) has no model.

    Raises:
        HalfbyteError: a value is out of range.
    """

    population: int = 30
    elite: int = 2
    tournament: int = 3
    crossover_rate: float = 0.9
    mutation_rate: float | None = None
    model_share: float = 0.5

    NAME: ClassVar[str] = "genetic"
    LOWEST: ClassVar[dict[str, float]] = {"population": 2, "crossover_rate": 0, "mutation_rate": 0, "model_share": 0}
    HIGHEST: ClassVar[dict[str, float]] = {"crossover_rate": 1, "mutation_rate": 0.5, "model_share": 1}


class GeneticAlgorithm(AskTell[GeneticSettings]):
    """Elitist generations: tournament selection, two-point or uniform crossover, mutation, repair, fill; and a model.

    Sources: Goldberg and Deb, "A comparative analysis of selection schemes used in genetic algorithms", FOGA 1991
    (tournaments); Syswerda, "Uniform crossover in genetic algorithms", ICGA 1989; Chu and Beasley, "A genetic algorithm
    for the multidimensional knapsack problem", Journal of Heuristics 4, 1998 (repair instead of penalties); for the
    model see :mod:`.surrogate`.

    Args:
        problem: units, levels, budget; its ``prior`` is the model's.
        settings: how the search runs.
        rng: from ``np.random.default_rng(seed)``; the search owns it from here on.
        seeds: genomes to start from, repaired and filled; random feasible genomes make up the rest of the population.
            More seeds than ``settings.population`` all enter generation 0.

    Raises:
        HalfbyteError: a seed is not a genome of the problem, or the generator's state cannot be saved.
    """

    def __init__(
        self, problem: SearchSpace, settings: GeneticSettings, rng: np.random.Generator, seeds: Iterable[Genome] = ()
    ) -> None:
        self._elite = min(settings.elite, settings.population - 1)
        super().__init__(problem, settings, rng, seeds, limit=settings.population * (settings.generations + 1))

    def _start(self, seeds: list[Genome]) -> list[Genome]:
        """Generation 0: the seeds, then random genomes, each once; a space no larger than that enters whole."""
        genomes = dict.fromkeys(seeds)
        if self._space is not None and len(self._space) <= self.settings.population:
            return list(genomes | dict.fromkeys(self._space))
        for _ in range(ATTEMPTS * self.settings.population):
            if len(genomes) >= self.settings.population:
                break
            genomes.setdefault(random_genome(self.problem, self._rng))
        return list(genomes)

    def _breed(self) -> list[Genome]:
        """The next generation: the elite, then children that are not in it yet."""
        ranked = sorted(self.population, key=self._standing)
        genomes = dict.fromkeys(ranked[: self._elite])
        if self.problem.has_line:
            modelled = round(self.settings.model_share * (self.settings.population - len(genomes)))
            genomes |= dict.fromkeys(proposals(self.problem, self.scores, modelled, self._rng, self.shares))
        for _ in range(self.settings.population - len(genomes)):
            child = self._child(ranked)
            for attempt in range(ATTEMPTS):
                if child not in genomes:
                    break
                child = self._mutate(child, strength=2 + attempt)
            genomes.setdefault(child)
        if all(genome in self.scores for genome in genomes):
            self._refresh(genomes)
        return list(genomes)

    def _refresh(self, genomes: dict[Genome, None]) -> None:
        """Put unscored genomes in the place of children, last first: a generation of known ones teaches nothing."""
        known = list(genomes)[self._elite :]
        unknown = [genome for genome in self._space or () if genome not in self.scores]
        for _ in range(self.settings.population - self._elite):
            fresh = list(genomes)[int(self._rng.integers(len(genomes)))]
            for attempt in range(ATTEMPTS):
                fresh = self._mutate(fresh, strength=2 + attempt)
                if fresh not in self.scores and fresh not in genomes:
                    break
            else:
                left = [genome for genome in unknown if genome not in genomes]
                if not left:
                    break
                fresh = left[int(self._rng.integers(len(left)))]
            if len(genomes) >= self.settings.population:
                del genomes[known.pop()]
            genomes[fresh] = None

    def _child(self, ranked: list[Genome]) -> Genome:
        """One child of one or two tournament winners; ``ranked`` is the population, best first."""

        def winner() -> Genome:
            return ranked[int(self._rng.integers(len(ranked), size=self.settings.tournament).min())]

        child = winner()
        if self._rng.random() < self.settings.crossover_rate:
            child = self._cross(child, winner())
        return self._mutate(child)

    def _cross(self, first: Genome, second: Genome) -> Genome:
        """A child with units from both: a stretch of neighbours (two-point) or each by the toss of a coin (uniform)."""
        if self._rng.random() < 0.5:
            start, stop = sorted(self._rng.integers(self.problem.size + 1, size=2).tolist())
            return first[:start] + second[start:stop] + first[stop:]
        heads = self._rng.random(self.problem.size) < 0.5
        return tuple(a if head else b for a, b, head in zip(first, second, heads.tolist(), strict=True))

    def _mutate(self, genome: Genome, strength: float = 1.0) -> Genome:
        """Move units to a neighbouring level, then repair and fill.

        A unit moves up with probability ``rate * (0.5 + rank)`` and down with ``rate * (1.5 - rank)``: sensitive units
        tend to higher levels. A unit between two levels shares its chance between both directions.
        """
        problem = self.problem
        rate = self.settings.mutation_rate if self.settings.mutation_rate is not None else 1 / problem.size
        levels, top = problem.levels(genome), problem.tops
        share = np.where((levels > 0) & (levels < top), 0.5, 1.0) * min(rate * strength, 0.5)
        up = np.where(levels < top, share * (0.5 + problem.rank), 0.0)
        down = np.where(levels > 0, share * (1.5 - problem.rank), 0.0)
        draw = self._rng.random(problem.size)
        levels = levels + (draw < up) - ((draw >= up) & (draw < up + down))
        return problem.fill(problem.repair(problem.of_levels(levels), self._rng), self._rng)
