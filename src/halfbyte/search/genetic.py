"""A genetic algorithm over genomes that keep to a budget: the textbook's, with repair in place of penalties.

    generation 0 → score → (elite + tournaments → crossover → mutation → repair → fill) → score → …

Lower scores are better. Someone else scores; no genome is scored twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.problem import Genome, Problem, random_genome

ATTEMPTS = 20  # mutations tried for a child that is not known yet, then random genomes
STOPPING = ("generations", "patience")  # settings that a resumed search may change
AFRESH = "start afresh without --resume"

ScoreGenomes = Callable[[list[Genome], Genome | None], dict[Genome, float]]
"""``score(genomes, best)``: the score of each genome; ``best`` is the best so far, None in the first generation."""


@dataclass(frozen=True)
class GeneticSettings:
    """How the search runs; at most ``population + generations * (population - elite)`` genomes are scored.

    Attributes:
        population: genomes per generation.
        generations: that are bred after the start, which is generation 0.
        elite: best genomes that pass unchanged into the next generation; fewer where that would leave no child.
        tournament: genomes drawn to find one parent; the best of them wins.
        crossover_rate: probability that a child has two parents instead of one.
        mutation_rate: mean probability that a unit of a child changes its format; None is 1 / number of units.
        patience: generations without a better best after which the search has converged.

    Raises:
        HalfbyteError: a value is out of range.
    """

    population: int = 30
    generations: int = 25
    elite: int = 2
    tournament: int = 3
    crossover_rate: float = 0.9
    mutation_rate: float | None = None
    patience: int = 5

    def __post_init__(self) -> None:
        least = {"population": 2, "generations": 0, "crossover_rate": 0, "mutation_rate": 0}
        most = {"crossover_rate": 1, "mutation_rate": 0.5}
        for name, value in asdict(self).items():
            low, high = least.get(name, 1), most.get(name, math.inf)
            if value is not None and not low <= value <= high:
                expected = f"at least {low}" if high == math.inf else f"{low} to {high}"
                raise HalfbyteError(f"genetic {name}: out of range, expected {expected}, got {value}")


@dataclass(frozen=True)
class Generation:
    """One row of the history.

    Attributes:
        number: 0 is the start.
        evaluations: genomes scored so far.
        best: lowest score so far.
        mean, std: of the scores of the population.
        diversity: share of the units in which two genomes of the population differ, mean over all pairs.
    """

    number: int
    evaluations: int
    best: float
    mean: float
    std: float
    diversity: float


@dataclass(frozen=True)
class GeneticResult:
    """What a search found.

    Attributes:
        best: the genome with the lowest score; among equals the one that sorts first.
        scores: of all genomes, in the order in which they were scored.
        history: one row per generation.
        stopped: ``exhausted`` (no new genome was found), ``converged`` (out of patience) or ``generations``.
    """

    best: Genome
    scores: dict[Genome, float]
    history: list[Generation]
    stopped: str


@dataclass
class _State:
    """A search between two generations: all there is to know to go on from here."""

    rng: np.random.Generator
    scores: dict[Genome, float] = field(default_factory=dict)
    population: list[Genome] = field(default_factory=list)
    history: list[Generation] = field(default_factory=list)
    stalled: int = 0  # generations without a better best

    def standing(self, genome: Genome) -> tuple[float, Genome]:
        return self.scores[genome], genome

    @property
    def best(self) -> Genome:
        return min(self.scores, key=self.standing)


@dataclass(frozen=True)
class GeneticAlgorithm:
    """Elitism, tournaments, two-point or uniform crossover, mutation, repair, fill.

    Sources: Goldberg and Deb, "A comparative analysis of selection schemes used in genetic algorithms", FOGA 1991
    (tournaments); Syswerda, "Uniform crossover in genetic algorithms", ICGA 1989; Chu and Beasley, "A genetic algorithm
    for the multidimensional knapsack problem", Journal of Heuristics 4, 1998 (repair, fill, no child twice).

    Attributes:
        problem: menus and budget; its ``rank`` says which units mutation tends to raise.
        settings: how the search runs.
        seed: of everything random; the same seed and scores give the same search.
        starts: genomes of generation 0, repaired and filled; random ones make up the rest of the population.
    """

    problem: Problem
    settings: GeneticSettings = GeneticSettings()
    seed: int = 0
    starts: Sequence[Genome] = ()

    def run(
        self,
        score: ScoreGenomes,
        *,
        state: Mapping[str, Any] | None = None,
        save: Callable[[dict[str, Any]], None] | None = None,
        on_generation: Callable[[Generation], None] | None = None,
    ) -> GeneticResult:
        """Search until nothing new is found, nothing gets better, or all generations are done.

        Args:
            score: see ``ScoreGenomes``; each genome is asked for once.
            state: what ``save`` was given; the search goes on from there and ends as if it had not been interrupted.
            save: called after each generation with all there is to know, as dicts, lists and numbers for JSON.
            on_generation: called after each generation, after ``save``.

        Raises:
            HalfbyteError: a start is not a genome of the problem, a score is missing or not finite, or the state is
                damaged or of another problem or other settings.
        """
        now = _State(np.random.default_rng(self.seed)) if state is None else self._restored(state)
        while (stopped := self._stopped(now)) is None:
            generation = self._breed(now) if now.history else self._start(now)
            new = [genome for genome in generation if genome not in now.scores]
            if not new:
                stopped = "exhausted"
                break
            self._learn(now, generation, _checked(score(new, now.best if now.scores else None), new))
            if save is not None:
                save(self._saved(now))
            if on_generation is not None:
                on_generation(now.history[-1])
        return GeneticResult(now.best, now.scores, now.history, stopped)

    def _stopped(self, now: _State) -> str | None:
        if now.stalled >= self.settings.patience:
            return "converged"
        return "generations" if len(now.history) > self.settings.generations else None

    def _learn(self, now: _State, generation: list[Genome], scores: dict[Genome, float]) -> None:
        """Finish a generation."""
        before = now.scores[now.best] if now.scores else math.inf
        now.scores |= scores
        now.population = generation
        best = now.scores[now.best]
        now.stalled = 0 if best < before else now.stalled + 1
        values = np.array([now.scores[genome] for genome in generation])
        now.history.append(
            Generation(
                number=len(now.history),
                evaluations=len(now.scores),
                best=best,
                mean=float(values.mean()),
                std=float(values.std()),
                diversity=_diversity(generation),
            )
        )

    def _start(self, now: _State) -> list[Genome]:
        """Generation 0: the starts, then random genomes, each once."""
        genomes = dict.fromkeys(self.problem.fill(self.problem.repair(genome)) for genome in self.starts)
        for _ in range(ATTEMPTS * self.settings.population):
            if len(genomes) >= self.settings.population:
                break
            genomes.setdefault(random_genome(self.problem, now.rng))
        return list(genomes)

    def _breed(self, now: _State) -> list[Genome]:
        """The next generation: the elite, then children that are not known yet."""
        ranked = sorted(now.population, key=now.standing)
        elite = min(self.settings.elite, self.settings.population - 1)
        genomes = dict.fromkeys(ranked[:elite])
        for _ in range(self.settings.population - len(genomes)):
            genomes.setdefault(self._unknown(self._child(ranked, now.rng), genomes.keys() | now.scores.keys(), now.rng))
        return list(genomes)

    def _unknown(self, child: Genome, known: Set[Genome], rng: np.random.Generator) -> Genome:
        """``child``, mutated ever more until it is not ``known``; then random genomes; in the end a known one."""
        for attempt in range(2 * ATTEMPTS):
            if child not in known:
                break
            far = attempt >= ATTEMPTS
            child = random_genome(self.problem, rng) if far else self._mutate(child, rng, strength=2 + attempt)
        return child

    def _child(self, ranked: list[Genome], rng: np.random.Generator) -> Genome:
        """One child of one or two tournament winners; ``ranked`` is the population, best first."""

        def winner() -> Genome:
            return ranked[int(rng.integers(len(ranked), size=self.settings.tournament).min())]

        child = winner()
        if rng.random() < self.settings.crossover_rate:
            child = _cross(child, winner(), rng)
        return self._mutate(child, rng)

    def _mutate(self, genome: Genome, rng: np.random.Generator, strength: float = 1.0) -> Genome:
        """Move units by one format, then repair and fill.

        A unit moves up with probability ``rate * (0.5 + rank)`` and down with ``rate * (1.5 - rank)``: sensitive units
        tend to dearer formats. A unit in the middle of its menu shares its chance between both directions.
        """
        problem = self.problem
        rate = 1 / problem.size if self.settings.mutation_rate is None else self.settings.mutation_rate
        chosen = np.array(genome)
        inside = (chosen > 0) & (chosen < problem.tops)
        share = np.where(inside, 0.5, 1.0) * min(rate * strength, 0.5)
        up = np.where(chosen < problem.tops, share * (0.5 + problem.rank), 0.0)
        down = np.where(chosen > 0, share * (1.5 - problem.rank), 0.0)
        draw = rng.random(problem.size)
        moved = chosen + (draw < up) - ((draw >= up) & (draw < up + down))
        return problem.fill(problem.repair(moved.tolist(), rng), rng)

    def _identity(self) -> dict[str, Any]:
        """What two searches must have in common to be one, as JSON gives it back."""
        values = {**asdict(self.problem), **asdict(self.settings)}
        return json.loads(json.dumps({name: value for name, value in values.items() if name not in STOPPING}))

    def _saved(self, now: _State) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "scores": [[list(genome), score] for genome, score in now.scores.items()],
            "population": [list(genome) for genome in now.population],
            "history": [asdict(row) for row in now.history],
            "stalled": now.stalled,
            "rng": now.rng.bit_generator.state,
        }

    def _restored(self, state: Mapping[str, Any]) -> _State:
        """The search that ``state`` was taken from."""
        try:
            then, now = state["identity"], self._identity()
            changed = [name for name in now if then[name] != now[name]]
            if not changed:
                return self._parsed(state)
        except (KeyError, TypeError, ValueError, AttributeError, HalfbyteError) as error:
            raise HalfbyteError(f"search state: damaged, {error!r}", fix=AFRESH) from error
        raise HalfbyteError(f"search state: the search was started with other {', '.join(changed)}", fix=AFRESH)

    def _parsed(self, state: Mapping[str, Any]) -> _State:
        """``state`` as values; any exception says that it is damaged."""
        rng = np.random.default_rng()
        rng.bit_generator.state = state["rng"]
        found = _State(
            rng,
            scores={self.problem.check(genome): float(score) for genome, score in state["scores"]},
            population=[self.problem.check(genome) for genome in state["population"]],
            history=[Generation(**row) for row in state["history"]],
            stalled=int(state["stalled"]),
        )
        if not found.population or not set(found.population) <= set(found.scores):
            raise ValueError("the population is not scored")
        if not found.history or found.history[-1].best != found.scores[found.best]:
            raise ValueError("the history is of other scores")
        return found


def _checked(scores: Mapping[Genome, float], asked: list[Genome]) -> dict[Genome, float]:
    """``scores`` as plain floats in the order of ``asked``."""
    if set(scores) != set(asked):
        raise HalfbyteError(f"scores: not those of the {len(asked)} genomes that were asked for, got {len(scores)}")
    bad = [score for score in scores.values() if not math.isfinite(score)]
    if bad:
        raise HalfbyteError(
            f"{len(bad)} of {len(asked)} genomes: score is not finite, got {bad[0]}",
            fix="the quantised model overflows; load it in bfloat16 or float32",
        )
    return {genome: float(scores[genome]) for genome in asked}


def _cross(first: Genome, second: Genome, rng: np.random.Generator) -> Genome:
    """A child with units from both: a stretch of neighbours (two-point) or each by the toss of a coin (uniform)."""
    if rng.random() < 0.5:
        start, stop = sorted(rng.integers(len(first) + 1, size=2).tolist())
        return first[:start] + second[start:stop] + first[stop:]
    heads = (rng.random(len(first)) < 0.5).tolist()
    return tuple(a if head else b for a, b, head in zip(first, second, heads, strict=True))


def _diversity(genomes: list[Genome]) -> float:
    """Share of units in which two genomes differ, mean over pairs; 0 for one genome."""
    table = np.array(genomes)  # [genomes, units]
    differences = np.count_nonzero(table[:, None] != table)
    return float(differences / max(1, table.size * (len(genomes) - 1)))
