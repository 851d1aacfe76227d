"""A genetic algorithm that proposes genomes and leaves the scoring to someone else (ask and tell).

    search = GeneticAlgorithm(problem, GeneticSettings(), np.random.default_rng(seed), seeds=[...])
    while not search.done:
        search.tell({genome: kl_of(genome) for genome in search.ask()})

Lower scores are better. Every genome that is asked for keeps to the budget and leaves no room in it. ``state`` between
any two calls is all there is: a search that goes on from it makes the same choices, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.search.baselines import random_genome
from halfbyte.search.problem import Genome, Problem

STATE_VERSION = 1
BIT_GENERATORS = {"PCG64": np.random.PCG64, "PCG64DXSM": np.random.PCG64DXSM}  # whose state JSON can hold
ATTEMPTS = 20  # mutations tried for a child that nobody else in its generation is, and per place for an unscored one
STOPPING = ("generations", "patience", "tolerance")  # settings that a resumed search may change


@dataclass(frozen=True)
class GeneticSettings:
    """How the search runs.

    Attributes:
        population: genomes per generation.
        generations: generations that are bred after the start, which is generation 0. At most
            ``population + generations * (population - elite)`` genomes are scored.
        elite: best genomes that pass unchanged into the next generation; fewer where that would leave no child.
        tournament: genomes drawn to find one parent; the best of them wins.
        crossover_rate: probability that a child has two parents instead of one.
        mutation_rate: mean probability that a unit of a child changes its choice; None is 1 / number of units.
        patience: generations without improvement after which the search has converged.
        tolerance: an improvement counts for ``patience`` only when it is larger than this (the noise of the score).

    Raises:
        HalfbyteError: a value is out of range.
    """

    population: int = 30
    generations: int = 25
    elite: int = 2
    tournament: int = 3
    crossover_rate: float = 0.9
    mutation_rate: float | None = None
    patience: int = 8
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        lowest = {"population": 2, "generations": 0, "crossover_rate": 0, "mutation_rate": 0, "tolerance": 0}
        highest = {"crossover_rate": 1, "mutation_rate": 0.5}
        for name, value in asdict(self).items():
            least, most = lowest.get(name, 1), highest.get(name, math.inf)
            if value is not None and not least <= value <= most:
                expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise HalfbyteError("setting is out of range", where=f"genetic {name}", expected=expected, got=value)


class GeneticAlgorithm:
    """Elitist generations: tournament selection, two-point or uniform crossover, mutation, repair, fill.

    Sources: Goldberg and Deb, "A comparative analysis of selection schemes used in genetic algorithms", FOGA 1991
    (tournaments); Syswerda, "Uniform crossover in genetic algorithms", ICGA 1989; Chu and Beasley, "A genetic algorithm
    for the multidimensional knapsack problem", Journal of Heuristics 4, 1998 (repair instead of penalties).

    Args:
        problem: units, costs, budget.
        settings: how the search runs.
        rng: from ``np.random.default_rng(seed)``; the search owns it from here on.
        seeds: genomes to start from, repaired and filled; random feasible genomes make up the rest of the population.
            More seeds than ``settings.population`` all enter generation 0.

    Raises:
        HalfbyteError: a seed is not a genome of the problem, or the generator's state cannot be saved.
    """

    def __init__(
        self, problem: Problem, settings: GeneticSettings, rng: np.random.Generator, seeds: Iterable[Genome] = ()
    ) -> None:
        if type(rng.bit_generator) not in BIT_GENERATORS.values():
            raise HalfbyteError("random generator cannot be saved", expected="np.random.default_rng(seed)", got=rng)
        self.problem, self.settings = problem, settings
        self.scores: dict[Genome, float] = {}
        self.population: list[Genome] = []
        self.history: list[dict[str, float]] = []
        self._rng, self._elite = rng, min(settings.elite, settings.population - 1)
        self._stalled, self._reference = 0, math.inf  # generations without improvement, and on what
        self._space = problem.space(settings.population * (settings.generations + 1))
        self._candidates: list[Genome] | None = self._start([problem.fill(problem.repair(seed)) for seed in seeds])

    @property
    def generation(self) -> int:
        """Number of the last finished generation; -1 before the start is scored."""
        return len(self.history) - 1

    @property
    def stop_reason(self) -> str | None:
        """None while it goes on, else ``exhausted`` (every full genome is scored), ``converged`` or ``generations``."""
        if not self.history:
            return None
        if self._space is not None and len(self.scores) >= len(self._space):
            return "exhausted"
        if self._stalled >= self.settings.patience:
            return "converged"
        return "generations" if self.generation >= self.settings.generations else None

    @property
    def done(self) -> bool:
        """Whether the search is finished."""
        return self.stop_reason is not None

    @property
    def best(self) -> tuple[Genome, float]:
        """The genome with the lowest score and its score; among equals the genome that sorts first.

        Raises:
            HalfbyteError: nothing is scored yet.
        """
        if not self.scores:
            raise HalfbyteError("nothing is scored yet", where="search")
        best = min(self.scores, key=self._standing)
        return best, self.scores[best]

    def ask(self) -> list[Genome]:
        """Genomes that :meth:`tell` wants scores for, each once, none scored before; the same until it is told.

        The list may be empty: then all of this generation is known, and ``tell({})`` finishes it.

        Raises:
            HalfbyteError: the search is done.
        """
        if self.done:
            raise HalfbyteError("the search is finished", where="ask", got=self.stop_reason)
        if self._candidates is None:
            self._candidates = self._breed()
        return [genome for genome in self._candidates if genome not in self.scores]

    def tell(self, scores: Mapping[Genome, float]) -> None:
        """Finish the generation with a score for every genome of the last :meth:`ask`.

        Raises:
            HalfbyteError: nothing was asked, the genomes are not those that were asked for, or a score is NaN or
                infinite. The search is then as it was before.
        """
        asked = self.ask()
        if set(scores) != set(asked):
            raise HalfbyteError(
                "scores are not for the genomes that were asked for", where="tell", expected=len(asked), got=len(scores)
            )
        bad = [score for score in scores.values() if not math.isfinite(score)]
        if bad:
            raise HalfbyteError(
                "score is not finite",
                where=f"{len(bad)} of {len(asked)} genomes",
                got=bad[0],
                fix="the quantised model overflows; load it in bfloat16 or float32",
            )
        self.scores.update((genome, float(scores[genome])) for genome in asked)
        self.population, self._candidates = self._candidates or [], None
        score = self.best[1]
        if score < self._reference - self.settings.tolerance:
            self._reference, self._stalled = score, 0
        else:
            self._stalled += 1
        self.history.append(self._summary())

    def state(self) -> dict[str, Any]:
        """Everything the search is, as dicts, lists, strings and numbers that JSON can hold."""
        return {
            "version": STATE_VERSION,
            "identity": _identity(self.problem, self.settings),
            "scores": [[list(genome), score] for genome, score in self.scores.items()],
            "population": [list(genome) for genome in self.population],
            "candidates": None if self._candidates is None else [list(genome) for genome in self._candidates],
            "history": [dict(row) for row in self.history],
            "stalled": self._stalled,
            "reference": None if self._reference == math.inf else self._reference,
            "rng": self._rng.bit_generator.state,
        }

    @classmethod
    def from_state(cls, problem: Problem, settings: GeneticSettings, state: Mapping[str, Any]) -> GeneticAlgorithm:
        """The search that ``state`` was taken from.

        ``settings`` may differ in when to stop (``generations``, ``patience``, ``tolerance``), in nothing else.

        Raises:
            HalfbyteError: the state is damaged, of another version, or of another problem or other settings.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != STATE_VERSION:
            raise HalfbyteError("search state is not readable", where="resume", expected=STATE_VERSION, got=version)
        try:
            now, then = _identity(problem, settings), state["identity"]
            changed = [name for name in now if now[name] != then[name]]
            if changed:
                raise HalfbyteError(
                    f"the search was started with other {', '.join(changed)}",
                    where="resume",
                    fix="use the same settings, or start afresh without --resume",
                )
            rng = np.random.Generator(BIT_GENERATORS[state["rng"]["bit_generator"]]())
            search = cls(problem, settings, rng)
            search.scores = {problem.check(genome): float(score) for genome, score in state["scores"]}
            search.population = [problem.check(genome) for genome in state["population"]]
            candidates = state["candidates"]
            search._candidates = None if candidates is None else [problem.check(genome) for genome in candidates]
            search.history = [dict(row) for row in state["history"]]
            search._stalled = state["stalled"]
            search._reference = math.inf if state["reference"] is None else state["reference"]
            rng.bit_generator.state = state["rng"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HalfbyteError("search state is damaged", where="resume", got=repr(error)) from error
        return search

    def _standing(self, genome: Genome) -> tuple[float, Genome]:
        return self.scores[genome], genome

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
        """Move units to a neighbouring choice, then repair and fill.

        A unit moves up with probability ``rate * (0.5 + rank)`` and down with ``rate * (1.5 - rank)``: sensitive units
        tend to larger choices. A unit between two choices shares its chance between both directions.
        """
        problem = self.problem
        rate = self.settings.mutation_rate if self.settings.mutation_rate is not None else 1 / problem.size
        levels = np.array([problem.choices.index(bits) for bits in genome])
        top = len(problem.choices) - 1
        share = np.where((levels > 0) & (levels < top), 0.5, 1.0) * min(rate * strength, 0.5)
        up = np.where(levels < top, share * (0.5 + problem.rank), 0.0)
        down = np.where(levels > 0, share * (1.5 - problem.rank), 0.0)
        draw = self._rng.random(problem.size)
        levels = levels + (draw < up) - ((draw >= up) & (draw < up + down))
        mutated = tuple(problem.choices[level] for level in levels.tolist())
        return problem.fill(problem.repair(mutated, self._rng), self._rng)

    def _summary(self) -> dict[str, float]:
        """One row of the history. ``diversity``: share of units in which two genomes of the population differ, mean."""
        scores = np.array([self.scores[genome] for genome in self.population])
        genomes = np.array(self.population)  # [population, units]
        differences = np.count_nonzero(genomes[:, None] != genomes)
        return {
            "generation": self.generation + 1,
            "evaluations": len(self.scores),
            "best": self.best[1],
            "mean": float(scores.mean()),
            "std": float(scores.std()),
            "diversity": float(differences / max(1, genomes.size * (len(genomes) - 1))),
        }


def _identity(problem: Problem, settings: GeneticSettings) -> dict[str, Any]:
    """What two searches must have in common to be one; tuples as lists, as JSON gives them back."""
    values = {**asdict(problem), **asdict(settings)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in STOPPING
    }
