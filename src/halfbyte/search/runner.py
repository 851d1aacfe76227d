"""Drive an ask/tell algorithm with an evaluator, and save its state after every generation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.files import write_text
from halfbyte.progress import Progress, Reporter
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.problem import Genome, Problem


def run_genetic(
    problem: Problem,
    settings: GeneticSettings,
    *,
    seeds: Sequence[Genome],
    seed: int,
    score: Callable[[Genome], float],
    state_file: Path,
    resume: bool,
    report: Reporter,
) -> GeneticAlgorithm:
    """Search until the algorithm is done; an interruption loses at most the running generation.

    Args:
        problem, settings, seeds, seed: see :mod:`halfbyte.search.genetic`.
        score: what to minimise; a pure function of the genome.
        state_file: JSON, written whole after each generation.
        resume: continue from ``state_file`` if it exists.

    Raises:
        HalfbyteError: the state file is damaged.
    """
    if resume and state_file.exists():
        try:
            state = json.loads(state_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise HalfbyteError(
                "search state is damaged", where=state_file, fix="start again without --resume"
            ) from error
        algorithm = GeneticAlgorithm.from_state(problem, settings, state)
    else:
        algorithm = GeneticAlgorithm(problem, settings, np.random.default_rng(seed), seeds)
    started, evaluations = time.monotonic(), 0
    while not algorithm.done:
        scores: dict[Genome, float] = {}
        genomes = algorithm.ask()
        for genome in genomes:
            scores[genome] = score(genome)
            evaluations += 1
            best = min([*scores.values(), *([algorithm.best[1]] if algorithm.history else [])])
            spent = time.monotonic() - started
            rate = f", {evaluations / spent:.2g} evaluations/s" if spent > 5 else ""
            generation = algorithm.generation + 1  # 0 is the starting population
            report(
                Progress(
                    "genetic search",
                    round(1000 * (generation + len(scores) / len(genomes))),
                    1000 * (settings.generations + 1),
                    f"generation {generation}/{settings.generations}, best {best:.5g}{rate}",
                )
            )
        algorithm.tell(scores)
        write_text(state_file, json.dumps(algorithm.state()))
    return algorithm
