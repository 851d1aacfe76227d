"""Ask and tell: an algorithm proposes genomes, someone else scores them. What all such algorithms share.

    search = Algorithm(problem, settings, np.random.default_rng(seed), seeds=[...])
    while not search.done:
        search.tell({genome: kl_of(genome) for genome in search.ask()})

Lower scores are better. Every genome that is asked for keeps to the budget and leaves no room in it. ``state`` between
any two calls is all there is: a search that goes on from it makes the same choices, bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.space import Genome, SearchSpace

STATE_VERSION = 2
BIT_GENERATORS = {"PCG64": np.random.PCG64, "PCG64DXSM": np.random.PCG64DXSM}  # whose state JSON can hold
ATTEMPTS = 20  # mutations tried for a child that nobody else in its generation is, and per place for an unscored one


@dataclass(frozen=True)
class Stopping:
    """When a search ends; settings that a resumed search may change.

    Attributes:
        generations: generations that are bred after the start, which is generation 0.
        patience: generations without improvement after which the search has converged.
        tolerance: an improvement counts for ``patience`` only when it is larger than this (the noise of the score).

    Raises:
        HalfbyteError: a value is out of range.
    """

    generations: int = 25
    patience: int = 8
    tolerance: float = 0.0

    NAME: ClassVar[str] = "search"  # of the algorithm, for messages
    LOWEST: ClassVar[dict[str, float]] = {"generations": 0, "tolerance": 0}  # 1 where nothing is said
    HIGHEST: ClassVar[dict[str, float]] = {}

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least, most = {**Stopping.LOWEST, **self.LOWEST}.get(name, 1), self.HIGHEST.get(name, math.inf)
            if value is not None and not least <= value <= most:
                expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise HalfbyteError(
                    "setting is out of range", where=f"{self.NAME} {name}", expected=expected, got=value
                )


STOPPING = tuple(field.name for field in fields(Stopping))
Settings = TypeVar("Settings", bound=Stopping)
Search = TypeVar("Search", bound="AskTell[Any]")


class AskTell(ABC, Generic[Settings]):
    """Generations of genomes and their scores; a subclass says which genomes come next.

    Args:
        problem: units, levels, budget.
        settings: how the search runs.
        rng: from ``np.random.default_rng(seed)``; the search owns it from here on.
        seeds: genomes to start from, repaired and filled.
        limit: no more genomes than this will be scored; spaces up to it are known whole, so that none is left out.

    Raises:
        HalfbyteError: a seed is not a genome of the problem, or the generator's state cannot be saved.
    """

    def __init__(
        self,
        problem: SearchSpace,
        settings: Settings,
        rng: np.random.Generator,
        seeds: Iterable[Genome] = (),
        *,
        limit: int,
    ) -> None:
        if type(rng.bit_generator) not in BIT_GENERATORS.values():
            raise HalfbyteError("random generator cannot be saved", expected="np.random.default_rng(seed)", got=rng)
        self.problem, self.settings = problem, settings
        self.scores: dict[Genome, float] = {}
        self.shares: dict[Genome, float] = {}  # of the text, for scores that are not from all of it
        self.population: list[Genome] = []
        self.history: list[dict[str, float]] = []
        self._rng = rng
        self._stalled, self._reference = 0, math.inf  # generations without improvement, and on what
        self._space = problem.space(limit)
        self._candidates: list[Genome] | None = self._start([problem.fill(problem.repair(seed)) for seed in seeds])

    @abstractmethod
    def _start(self, seeds: list[Genome]) -> list[Genome]:
        """Generation 0."""

    @abstractmethod
    def _breed(self) -> list[Genome]:
        """The next generation, each genome once, scored ones too."""

    def _survivors(self, candidates: list[Genome]) -> list[Genome]:
        """The population that a finished generation leaves."""
        return candidates

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

    @property
    def complete(self) -> list[Genome]:
        """Genomes whose scores come from all of the text, oldest first: the anchors of a race."""
        return [genome for genome in self.scores if genome not in self.shares]

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

    def tell(self, scores: Mapping[Genome, float], shares: Mapping[Genome, float] | None = None) -> None:
        """Finish the generation with a score for every genome of the last :meth:`ask`.

        Args:
            scores: lower is better.
            shares: of the text that a score comes from, above 0 to 1 (all of it, also where nothing is said): an
                estimate from little text says less to the model.

        Raises:
            HalfbyteError: nothing was asked, the genomes are not those that were asked for, a score is NaN or
                infinite, or a share is out of range. The search is then as it was before.
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
        partial = {genome: float(share) for genome, share in (shares or {}).items() if share != 1 and genome in scores}
        if not all(0 < share < 1 for share in partial.values()):
            raise HalfbyteError("share of the text is out of range", where="tell", expected="above 0 to 1")
        self.scores.update((genome, float(scores[genome])) for genome in asked)
        self.shares.update(partial)
        self.population, self._candidates = self._survivors(self._candidates or []), None
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
            "identity": self._identity(self.problem, self.settings),
            "scores": [[list(genome), score] for genome, score in self.scores.items()],
            "shares": [[list(genome), share] for genome, share in self.shares.items()],
            "population": [list(genome) for genome in self.population],
            "candidates": None if self._candidates is None else [list(genome) for genome in self._candidates],
            "history": [dict(row) for row in self.history],
            "stalled": self._stalled,
            "reference": None if self._reference == math.inf else self._reference,
            "rng": self._rng.bit_generator.state,
        }

    @classmethod
    def from_state(cls: type[Search], problem: SearchSpace, settings: Any, state: Mapping[str, Any]) -> Search:
        """The search that ``state`` was taken from.

        ``settings`` may differ in when to stop (``generations``, ``patience``, ``tolerance``), in nothing else.

        Raises:
            HalfbyteError: the state is damaged, of another version, or of another algorithm, problem or settings.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != STATE_VERSION:
            raise HalfbyteError(
                "search state is not readable",
                where="resume",
                expected=f"version {STATE_VERSION}",
                got=version,
                fix="start afresh without --resume",
            )
        try:
            now, then = cls._identity(problem, settings), state["identity"]
            changed = [name for name in now if name not in then or now[name] != then[name]]
            if changed:
                raise HalfbyteError(
                    f"the search was started with other {', '.join(changed)}",
                    where="resume",
                    fix="use the same settings, or start afresh without --resume",
                )
            rng = np.random.Generator(BIT_GENERATORS[state["rng"]["bit_generator"]]())
            search = cls(problem, settings, rng)  # type: ignore[call-arg]  # subclasses set the limit themselves
            search.scores = {problem.check(genome): float(score) for genome, score in state["scores"]}
            search.shares = {problem.check(genome): float(share) for genome, share in state["shares"]}
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

    @classmethod
    def _identity(cls, problem: SearchSpace, settings: Stopping) -> dict[str, Any]:
        """What two searches must have in common to be one; tuples as lists, as JSON gives them back."""
        values = {"algorithm": cls.__name__, **asdict(problem), **asdict(settings)}
        return {name: _as_lists(value) for name, value in values.items() if name not in STOPPING}

    def _standing(self, genome: Genome) -> tuple[float, Genome]:
        return self.scores[genome], genome

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


def _as_lists(value: Any) -> Any:
    """``value`` with lists for tuples, at any depth."""
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value
