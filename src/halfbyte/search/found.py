"""What a search of one menu comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from halfbyte.search.genetic import Generation
from halfbyte.search.problem import Genome


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
        }
