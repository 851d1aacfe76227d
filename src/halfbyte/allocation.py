"""Decide which unit gets which bits: measure units, breed genomes, and let other text choose among the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from halfbyte.core.distributed import Group
from halfbyte.core.progress import report
from halfbyte.models.layers import Unit, mean_bits_fraction
from halfbyte.options import SearchOptions
from halfbyte.results import Found, FrontPoint
from halfbyte.search.asktell import AskTell
from halfbyte.search.baselines import all_choice, rule_genome
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.fitness import Fitness, KLFitness, PricedEvaluator
from halfbyte.search.genetic import GeneticSettings
from halfbyte.search.problem import Genome, Problem
from halfbyte.search.racing import Choice, choose
from halfbyte.search.runner import run_genetic
from halfbyte.search.sensitivity import LayerSensitivity, unit_errors, unit_ratios
from halfbyte.search.surrogate import best_for, finalists
from halfbyte.workdir import Stages

FINALISTS = 6  # genomes of the search that are validated, beside the baselines
FRONT = tuple(step / 20 for step in range(10, 21))  # budgets of a front: 0.5, 0.55 … 1
FRONT_SHARE = 5  # of the generations, for each budget of a front


class Allocator:
    """One model's units, and what is known about them.

    Args:
        units: one gene each.
        fitness: what to minimise on the search text.
        judge: KL on the validation text, or None.
        sensitivity: layer name -> measured errors.
        options: population, generations, seed.
        stages, group: where to keep results, whom to tell, who shares the work.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        fitness: Fitness,
        judge: KLEvaluator | None,
        sensitivity: Mapping[str, LayerSensitivity],
        options: SearchOptions,
        stages: Stages,
        group: Group,
    ) -> None:
        self.units, self.fitness, self.judge, self.sensitivity = units, fitness, judge, sensitivity
        self.options, self.stages, self.group = options, stages, group

    @cached_property
    def gains(self) -> list[float]:
        """What each unit gains by A8 on its own."""

        def tell(done: int) -> None:
            report("KL of each unit at A4", done, len(self.units), self.units[done - 1].name)

        return self.stages.value("unit_gains", lambda: self.fitness.gains(tell))

    def best(self, budget: float, generations: int, name: str = "genetic") -> Found:
        """Search one budget, from the sensitivity rule and knapsacks over KL and, if measured, Fisher-weighted errors.

        Args:
            budget: mean activation bits / 8.
            generations: of the genetic algorithm.
            name: of its state file.
        """
        problem = Problem(tuple(unit.macs for unit in self.units), budget, priority=tuple(self.gains))
        baselines = starting_points(problem, self.units, self.sensitivity)
        fixed = {"all A8": all_choice(problem, 8), "all A4": all_choice(problem, 4), **baselines}
        scores = {label: self.fitness.score(genome) for label, genome in fixed.items()}
        algorithm = run_genetic(
            problem,
            GeneticSettings(population=self.options.ga_pop, generations=generations),
            seeds=list(baselines.values()),
            seed=self.options.seed,
            fitness=self.fitness,
            state_file=self.stages.folder / f"{name}.json",
            resume=self.stages.resumed,
            group=self.group,
        )
        about: dict[str, Any] = {"evaluations": len(algorithm.scores)}
        winner = algorithm.best[0]
        if isinstance(self.fitness, KLFitness) and self.judge is not None:
            tokens = self.judge.windows * self.judge.length
            report("validation", 0, 1, f"{tokens} tokens each")
            choice = validated(baselines.values(), algorithm, self.fitness.evaluator, self.judge)
            winner = choice.winner
            losses = {label: self.judge.score(genome) for label, genome in {**fixed, "plan": winner}.items()}
            names = {genome: label for label, genome in baselines.items()}
            about |= {
                "finalists": len(choice.differences),
                "ties": len(choice.ties),
                "noise_floor": choice.noise_floor,
                "winner": names.get(winner, "genetic search"),
                "validation": losses,
            }
            report("validation", 1, 1, f"noise floor {choice.noise_floor:.2g}")
        return Found(winner, {**scores, "plan": self.fitness.score(winner)}, algorithm.history, about)

    def front(self) -> list[FrontPoint]:
        """The best allocation of each budget in ``FRONT``, by shorter searches."""
        points = []
        for budget in FRONT:
            generations = max(1, self.options.ga_gen // FRONT_SHARE)
            found = self.best(budget, generations, f"genetic-{budget:.2f}")
            validation = found.about["validation"]
            points.append(
                FrontPoint(
                    budget,
                    8 * mean_bits_fraction(self.units, found.genome),
                    found.scores["plan"],
                    validation["plan"],
                    validation["knapsack"],
                    found.about["noise_floor"],
                    {unit.name: bits for unit, bits in zip(self.units, found.genome, strict=True)},
                )
            )
        return points


def starting_points(problem: Problem, units: Sequence[Unit], rows: Mapping[str, LayerSensitivity]) -> dict[str, Genome]:
    """What the search starts from, and has to beat: name -> genome.

    Args:
        problem: its priority is what each unit gains by A8 on its own.
        rows: layer name -> measured errors; without loss gradients there is no Fisher knapsack.
    """
    ratios, last = unit_ratios(units, rows), max(unit.block for unit in units)
    rule = rule_genome(problem, ratios, [unit.block in (0, last) for unit in units])
    by_ratio = replace(problem, priority=tuple(ratios))  # brought to the budget by the same ratios, not by KL
    found = {"rule": by_ratio.fill(by_ratio.repair(rule)), "knapsack": best_for(problem, np.array(problem.priority))}
    if any(row.grad_power for row in rows.values()):
        found["Fisher knapsack"] = table_knapsack(problem, units, rows, "fisher")
    return found


def table_knapsack(problem: Problem, units: Sequence[Unit], rows: Mapping[str, LayerSensitivity], name: str) -> Genome:
    """The knapsack over a table of layer errors, ``mse`` or ``fisher``."""
    gains = [errors[4] - errors[8] for errors in unit_errors(units, rows, name)]
    return best_for(replace(problem, priority=tuple(gains)), np.array(gains))


def validated(
    starts: Iterable[Genome],
    algorithm: AskTell[Any],
    evaluator: KLEvaluator | PricedEvaluator,
    judge: KLEvaluator | PricedEvaluator,
    allowed: Callable[[Genome], bool] = lambda _: True,
) -> Choice:
    """The choice among where a search started and its best, by text that it has not seen.

    Args:
        allowed: genomes that may be chosen; at least one start is.
    """
    ranked = finalists(algorithm.problem, algorithm.scores, len(algorithm.scores), algorithm.shares)
    best = [genome for genome in ranked if allowed(genome)][:FINALISTS]
    judged = list(dict.fromkeys([*filter(allowed, starts), *best]))
    unseen, seen = (dict(zip(judged, text.losses(judged), strict=True)) for text in (judge, evaluator))
    return choose(unseen, seen, prefer=best[:1])  # among ties the model's own, which has averaged noise out
