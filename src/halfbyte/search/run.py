"""One search, whatever the menu: starts, a genetic algorithm on the search text, validation on other text."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from halfbyte.core.distributed import processes
from halfbyte.core.progress import report
from halfbyte.search.genetic import Generation, GeneticAlgorithm, GeneticResult, GeneticSettings
from halfbyte.search.problem import Genome, Problem
from halfbyte.search.validate import TIE_Z, choose, paired_difference, two_rungs
from halfbyte.workdir import read_kept, write_kept

FINALISTS = 6  # genomes of the search that are validated, beside its starts
STEPS = 1000  # of progress per generation
GENETIC = "genetic search"  # the winner's label where it is none of the starts
REFINED, TUNED = "refined", "tuned"  # what can be done to a winner's weights


class Scorer(Protocol):
    """Measures genomes on one text; lower is better. What was measured before is answered from memory.

    Attributes:
        windows, length: of the text, in tokens.
        tokens_run: tokens that went through the model so far.
        tick: called after every batch.
    """

    windows: int
    length: int
    tokens_run: float
    tick: Callable[[], None]

    def losses(self, genomes: Sequence[Genome], windows: Iterable[int] | None = None) -> np.ndarray:
        """Mean loss per segment, fp64 ``[genomes, windows, segments]``."""
        ...

    def score(self, genome: Genome) -> float:
        """Mean loss over all windows."""
        ...


class Searchable(ABC):
    """What a search has to know of a menu.

    Attributes:
        name: of the menu.
        title: the same for people: what is chosen.
        problem: units, formats, costs, budget, and what each format loses alone.
        score_label: what a score is, with its unit.
        on_search_text, on_validation_text: measure genomes; without the first the predicted losses are the score.
    """

    name: str
    title: str
    problem: Problem
    score_label: str
    on_search_text: Scorer | None
    on_validation_text: Scorer | None

    @abstractmethod
    def starts(self, problem: Problem) -> dict[str, Genome]:
        """What the search starts from and has to beat, label -> a genome that keeps to the budget of ``problem``."""

    def ends(self, problem: Problem) -> dict[str, Genome]:
        """More genomes to report the scores of, whatever they cost."""
        return {}

    @abstractmethod
    def choice(self, genome: Genome) -> dict[str, int | str]:
        """Unit or matrix -> the format that ``genome`` gives it."""


@dataclass(frozen=True)
class Refinement:
    """What refining or tuning the winner did to it: its weights, made or fitted for the formats that were chosen.

    Attributes:
        what: was done: ``refined`` or ``tuned``.
        before, after: its loss on the validation text.
        noise: standard error of the difference, for people: the better of two on unseen text is the better guess.
    """

    what: str
    before: float
    after: float
    noise: float

    @staticmethod
    def between(what: str, before: np.ndarray, after: np.ndarray) -> Refinement:
        """From the losses on the validation text, each ``[windows, segments]``."""
        difference, error = paired_difference(after, before)
        return Refinement(what, float(before.mean()), float(before.mean()) + difference, TIE_Z * error)

    @property
    def label(self) -> str:
        """Of the score afterwards."""
        return f"plan, {self.what}"

    @property
    def kept(self) -> bool:
        """Whether it lost less."""
        return self.after < self.before

    @property
    def said(self) -> str:
        """For people."""
        verdict = "kept" if self.kept else "dropped, the search's weights stay"
        return f"KL on the validation text {self.before:.4g} -> {self.after:.4g} (noise {self.noise:.2g}): {verdict}"


@dataclass(frozen=True)
class Found:
    """The winner of a search, and what it had to beat.

    Attributes:
        genome: the winner.
        choice: unit or matrix -> the format that it gets.
        cost, budget: what the winner costs, and what it might cost, in the problem's unit.
        score_label: what a score is, with its unit.
        search_scores: label -> score on the search text: of the winner (``plan``), of what the search started from, and
            of the ends of the menu.
        validation_scores: the same on text that nothing was chosen on; empty where there is none.
        winner: the label of the start that won, or ``genetic search``.
        finalists, ties: genomes that the validation text was asked about, and those that it cannot tell from the best.
        noise_floor: standard error of a difference between two finalists on the validation text.
        evaluations: genomes that were scored.
        history: one row per generation.
        front: budget -> the winner of that budget, where a front was asked for.
        refinement: of the winner's weights, if that was tried; scores are those before, and ``plan, refined`` or
            ``plan, tuned`` is after.
    """

    genome: Genome
    choice: Mapping[str, int | str]
    cost: int
    budget: int
    score_label: str
    search_scores: Mapping[str, float]
    validation_scores: Mapping[str, float]
    winner: str
    finalists: int
    ties: int
    noise_floor: float
    evaluations: int
    history: Sequence[Generation]
    front: Mapping[str, Found] = field(default_factory=dict)
    refinement: Refinement | None = None

    def with_refinement(self, refinement: Refinement) -> Found:
        """The same after refining."""
        after = {refinement.label: refinement.after} if refinement.kept else {}
        return replace(self, refinement=refinement, validation_scores={**self.validation_scores, **after})

    @property
    def refined(self) -> bool:
        """Whether the winner's weights are those that were made for it."""
        return self.refinement is not None and self.refinement.kept

    def record(self) -> dict[str, object]:
        """What plans and reports say of the search, in types that JSON has."""
        return {
            "scores": dict(self.search_scores),
            "validation": dict(self.validation_scores),
            "winner": self.winner,
            "evaluations": self.evaluations,
            "finalists": self.finalists,
            "ties": self.ties,
            "noise_floor": self.noise_floor,
            "refinement": {} if self.refinement is None else {**asdict(self.refinement), "kept": self.refined},
        }


def search_menu(
    menu: Searchable,
    settings: GeneticSettings,
    *,
    seed: int,
    state_file: Path,
    resume: bool,
    budget: int | None = None,
    at_most: float = 0.0,
) -> Found:
    """Search one budget.

    Args:
        settings: of the genetic algorithm.
        seed: of everything random in it.
        state_file: rewritten after every generation by the first process; an interruption loses one generation at most.
        resume: go on from that file if it is there.
        budget: in the problem's unit; by default the problem's own.
        at_most: a loss on the validation text that the winner keeps to, if any finalist does; 0 is any.

    Raises:
        HalfbyteError: the state file is damaged or of another search, or several processes disagree.
    """
    problem = menu.problem if budget is None else menu.problem.with_budget(budget)
    starts, ends = menu.starts(problem), menu.ends(problem)
    scorer = menu.on_search_text
    score_one = problem.predicted if scorer is None else scorer.score
    search_scores = {label: score_one(genome) for label, genome in {**ends, **starts}.items()}
    result = _breed(menu, problem, settings, starts, seed, state_file, resume=resume)
    winner, finalists, ties, noise_floor = result.best, 1, 1, 0.0
    validation_scores: dict[str, float] = {}
    unseen = menu.on_validation_text
    if scorer is not None and unseen is not None:
        report(f"validation of {menu.title}", 0, 1, f"{unseen.windows * unseen.length} tokens each")
        ranked = sorted(result.scores, key=lambda genome: (result.scores[genome], genome))[:FINALISTS]
        candidates = list(dict.fromkeys([*starts.values(), *ranked]))
        within = [genome for genome in candidates if not at_most or unseen.score(genome) <= at_most]
        candidates = within or candidates
        validation, search = (dict(zip(candidates, text.losses(candidates), strict=True)) for text in (unseen, scorer))
        chosen = choose(validation, search)
        winner, finalists, ties, noise_floor = chosen.winner, len(candidates), len(chosen.ties), chosen.noise_floor
        named = {**ends, **starts, "plan": winner}
        validation_scores = {label: unseen.score(genome) for label, genome in named.items()}
        report(f"validation of {menu.title}", 1, 1, f"noise floor {noise_floor:.2g}")
    labels = {genome: label for label, genome in reversed(starts.items())}  # of equal ones the first
    return Found(
        genome=winner,
        choice=menu.choice(winner),
        cost=problem.spent(winner),
        budget=problem.budget,
        score_label=menu.score_label,
        search_scores={**search_scores, "plan": score_one(winner)},
        validation_scores=validation_scores,
        winner=labels.get(winner, GENETIC),
        finalists=finalists,
        ties=ties,
        noise_floor=noise_floor,
        evaluations=len(result.scores),
        history=result.history,
    )


def _breed(
    menu: Searchable,
    problem: Problem,
    settings: GeneticSettings,
    starts: Mapping[str, Genome],
    seed: int,
    state_file: Path,
    *,
    resume: bool,
) -> GeneticResult:
    """Run the genetic algorithm, or go on with it."""
    progress = _Generations(menu, settings)
    scorer = menu.on_search_text

    def score(genomes: list[Genome], best: Genome | None) -> dict[Genome, float]:
        processes().same(genomes)
        progress.starts(len(genomes))
        if scorer is None:
            return {genome: problem.predicted(genome) for genome in genomes}
        return two_rungs(genomes, best, scorer.losses, scorer.windows)

    def save(state: dict[str, Any]) -> None:
        if processes().first:
            write_kept(state_file, json.dumps(state))

    algorithm = GeneticAlgorithm(problem, settings, seed, list(starts.values()))
    result = algorithm.run(score, state=_saved(state_file, resume=resume), save=save, on_generation=progress.ended)
    progress.finish()
    return result


def _saved(state_file: Path, *, resume: bool) -> dict[str, Any] | None:
    """The state that the first process finds, in every process."""
    text = processes().from_first(read_kept(state_file) if resume else None)
    return None if text is None else json.loads(text)


class _Generations:
    """Tells how far the genetic algorithm is."""

    def __init__(self, menu: Searchable, settings: GeneticSettings) -> None:
        self.stage, self.scorer = f"search of {menu.title}", menu.on_search_text
        self.generations, self.number, self.best = settings.generations, -1, ""
        self.started, self.scored, self.running, self.share = time.monotonic(), 0, 0, 0.0
        self.whole, self.before = 1.0, 0.0
        if self.scorer is not None:
            self.scorer.tick = self._tick

    def starts(self, genomes: int) -> None:
        """A generation with so many genomes to score begins."""
        self.whole = max(1, genomes) / processes().size
        self.before = 0.0 if self.scorer is None else self.scorer.tokens_run
        self.scored, self.running, self.share = self.scored + self.running, genomes, 0.0

    def ended(self, generation: Generation) -> None:
        """A generation is over."""
        self.number, self.best, self.share = generation.number, f", best {generation.best:.5g}", 1.0
        self._say(0.0)

    def finish(self) -> None:
        """So is the search."""
        if self.scorer is not None:
            self.scorer.tick = lambda: None
        report(self.stage, 1, 1, self._note())

    def _tick(self) -> None:
        assert self.scorer is not None
        whole = self.whole * self.scorer.windows * self.scorer.length
        self.share = min(1.0, (self.scorer.tokens_run - self.before) / whole)
        self._say(self.share)

    def _say(self, share: float) -> None:
        total = STEPS * (self.generations + 1)  # the start is a generation too
        done = round(STEPS * (self.number + 1 + min(share, 0.99)))
        report(self.stage, min(done, total - 1), total, self._note())

    def _note(self) -> str:
        spent = time.monotonic() - self.started
        scored = self.scored + self.share * self.running
        rate = f", {scored / spent:.2g} genomes/s" if scored and spent > 1 else ""
        return f"generation {max(0, self.number)}/{self.generations}{self.best}{rate}"
