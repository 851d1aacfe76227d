"""Drive an ask/tell algorithm with a fitness, and save its state after every generation."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from halfbyte.core.distributed import ALONE, Group
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import write_text
from halfbyte.core.progress import report
from halfbyte.search.fitness import Fitness
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.space import Genome, SearchSpace

STEPS = 1000  # of progress per generation


def run_genetic(
    problem: SearchSpace,
    settings: GeneticSettings,
    *,
    seeds: Sequence[Genome],
    seed: int,
    fitness: Fitness,
    state_file: Path,
    resume: bool,
    group: Group = ALONE,
) -> GeneticAlgorithm:
    """Search until the algorithm is done; an interruption loses at most the running generation.

    Args:
        problem, settings, seeds, seed: see :mod:`halfbyte.search.genetic`.
        fitness: what to minimise.
        state_file: JSON, written whole after each generation, by the first process.
        resume: continue from ``state_file`` if it exists.
        group: processes that evaluate together; all of them propose the same genomes.

    Raises:
        HalfbyteError: the state file is damaged, or the processes disagree.
    """
    text = group.from_first(state_file.read_text(encoding="utf-8") if resume and state_file.exists() else None)
    if text is not None:
        try:
            state = json.loads(text)
        except ValueError as error:
            raise HalfbyteError(
                "search state is damaged", where=state_file, fix="start again without --resume"
            ) from error
        algorithm = GeneticAlgorithm.from_state(problem, settings, state)
    else:
        algorithm = GeneticAlgorithm(problem, settings, np.random.default_rng(seed), seeds)
    show = _Show(settings, algorithm)
    while not algorithm.done:
        genomes = group.same(algorithm.ask())
        before, whole = fitness.work, max(1, len(genomes)) / group.size
        fitness.tick = lambda before=before, whole=whole: show((fitness.work - before) / whole)
        incumbent = algorithm.best[0] if algorithm.history else None
        algorithm.tell(*fitness.scores(genomes, incumbent, algorithm.complete))
        show.scored += len(genomes)
        show(0.0)
        if group.first:
            write_text(state_file, json.dumps(algorithm.state()))
    fitness.tick = lambda: None
    report("genetic search", 1, 1, show.note())
    return algorithm


class _Show:
    """Reports a search while it runs.

    Attributes:
        scored: genomes scored in this run.
    """

    def __init__(self, settings: GeneticSettings, algorithm: GeneticAlgorithm) -> None:
        self.settings, self.algorithm, self.report = settings, algorithm, report
        self.started, self.scored = time.monotonic(), 0

    def note(self) -> str:
        """Generation, best score, evaluations per second."""
        known = f", best {self.algorithm.best[1]:.5g}" if self.algorithm.history else ""
        spent = time.monotonic() - self.started
        rate = f", {self.scored / spent:.2g} evaluations/s" if self.scored and spent > 1 else ""
        return f"generation {max(0, self.algorithm.generation)}/{self.settings.generations}{known}{rate}"

    def __call__(self, share: float) -> None:
        """``share`` of the running generation is done."""
        done = self.algorithm.generation + 1 + min(share, 0.99)  # the start is a generation too
        total = STEPS * (self.settings.generations + 1)
        report("genetic search", min(round(STEPS * done), total - 1), total, self.note())
