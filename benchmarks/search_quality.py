"""Who chooses best which units get 8 bits: every method with the same number of evaluations, judged on unseen text.

    python benchmarks/search_quality.py [--model demo] [--device auto] [--budgets 0.6 0.75 0.9] [--json OUT]

The model is prepared once, as ``mixed_precision_ptq.py --target sim`` does. Each of ``--seeds`` repeats draws its own
windows of the search and validation text and its own random numbers; what is printed is the mean KL (nats per token) on
the evaluation text, which no method has seen, and the standard deviation over the repeats.

- random: the best of ``--evaluations`` random genomes;
- rule, MSE, Fisher: no evaluations; the sensitivity rule, and knapsacks over tables of layer errors;
- KL knapsack: one evaluation per unit;
- evolution (1+28), plain genetic: from the rule and the KL and Fisher knapsacks, on whole search texts;
- search, whole texts: halfbyte's genetic algorithm with its model, without stages, then validation;
- search: the same in stages, the default.

``tokens`` is what the search itself read, as a share of ``--evaluations`` whole texts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from halfbyte.allocation import starting_points, table_knapsack, validated
from halfbyte.search.asktell import AskTell
from halfbyte.search.evolution import Evolution, EvolutionSettings
from halfbyte.search.fitness import KLFitness, stages_of
from halfbyte.search.racing import choose

from halfbyte.calibration.gradients import output_gradient_power
from halfbyte.calibration.text import load_text
from halfbyte.calibration.windows import cut
from halfbyte.core.device import device_name, resolve_device, resolve_dtype
from halfbyte.core.distributed import ALONE
from halfbyte.core.files import check_output, write_text
from halfbyte.models.layers import layers_of, units_of
from halfbyte.models.loading import find, load
from halfbyte.options import SearchOptions
from halfbyte.pipeline import FISHER_WINDOWS
from halfbyte.prepare.recipe import recipe_of
from halfbyte.prepare.walk import prepare_
from halfbyte.report.tables import Cell, markdown_table
from halfbyte.search.baselines import random_genome
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.genetic import GeneticAlgorithm, GeneticSettings
from halfbyte.search.problem import Genome, Problem
from halfbyte.search.reference import Reference, reference
from halfbyte.search.sensitivity import unit_errors

POPULATION = 30
FINALISTS = 6
TWO_RUNGS = "plain genetic, two rungs, then validation"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="Hugging Face id, local folder, .gguf file, or demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--text", default="auto", help="auto (wikitext2, else pydoc), wikitext2, pydoc, or a file")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.6, 0.75, 0.9])
    parser.add_argument("--whole", nargs="*", type=float, default=[0.6], help="budgets also searched without stages")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=240)
    parser.add_argument("--calib_tokens", type=int, default=SearchOptions().calib_tokens)
    parser.add_argument("--search_tokens", type=int, default=SearchOptions().search_tokens)
    parser.add_argument("--eval_windows", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--json", help="also write the numbers here, after each repeat")
    parser.add_argument("--force", action="store_true", help="overwrite an existing --json file")
    return parser.parse_args()


class Bench:
    """A prepared model, its text, and the unquantised model's answers on all of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, self.device)
        source = load(find(options.model), device=torch.device("cpu"), dtype=dtype)
        self.source, self.text = source, load_text(options.text)
        windows = {part: self._windows(part) for part in ("calib", "search", "valid", "eval")}
        calib = windows["calib"][:: max(1, len(windows["calib"]) * options.ctx // options.calib_tokens)]
        windows["eval"] = windows["eval"][: options.eval_windows]
        self.windows = windows
        self.known = {
            part: reference(source.model, source.family, windows[part], device=self.device)
            for part in ("search", "valid", "eval")
        }
        recipe = recipe_of(SearchOptions(target="sim"), tied=False)
        self.prepared = prepare_(source, calib, recipe, device=self.device)
        source.model.to(self.device)
        layers = layers_of(source.model, source.family)
        self.units = units_of(layers, source.family, "fused")
        power: dict[str, float] = {}
        for power in output_gradient_power(source.model, layers, calib[:FISHER_WINDOWS]):  # noqa: B007
            pass
        self.rows = {name: replace(row, grad_power=power[name]) for name, row in self.prepared.sensitivity.items()}
        self.unseen = self._evaluator(windows["eval"], self.known["eval"])

    def _windows(self, part: str) -> torch.Tensor:
        ids = self.source.tokenizer(self.text.parts[part], add_special_tokens=False).input_ids
        return torch.tensor(cut(ids, self.options.ctx, len(ids), where=part))

    def _evaluator(self, tokens: torch.Tensor, known: Reference) -> KLEvaluator:
        return KLEvaluator(self.source.model, self.source.family, self.units, tokens, known, group=ALONE)

    def drawn(self, part: str, rng: np.random.Generator) -> KLEvaluator:
        """An evaluator on some windows of a part."""
        count = min(len(self.windows[part]), self.options.search_tokens // self.options.ctx)
        chosen = torch.from_numpy(np.sort(rng.permutation(len(self.windows[part]))[:count]))
        known = self.known[part]
        there = chosen.to(known.projected.device)
        return self._evaluator(self.windows[part][chosen], Reference(known.projected[there], known.negentropy[there]))

    def repeat(self, seed: int) -> Iterator[tuple[float, dict[str, tuple[Genome, float]]]]:
        """Per budget: method -> (genome, share of tokens read), for one draw of texts and random numbers."""
        rng = np.random.default_rng(seed)
        judge, evaluator = self.drawn("valid", rng), self.drawn("search", rng)
        gains = KLFitness(evaluator, stages_of(evaluator.windows)).gains(lambda _: None)
        for budget in self.options.budgets:
            yield budget, self.methods(seed, budget, gains, evaluator, judge)

    def methods(
        self, seed: int, budget: float, gains: list[float], evaluator: KLEvaluator, judge: KLEvaluator
    ) -> dict[str, tuple[Genome, float]]:
        """Method -> (genome, share of tokens read) at one budget."""
        options, rng = self.options, np.random.default_rng(seed)
        fitness = KLFitness(evaluator, stages_of(evaluator.windows))
        problem = Problem(tuple(unit.macs for unit in self.units), budget, priority=tuple(gains))
        starts = starting_points(problem, self.units, self.rows)
        found = {
            "rule": (starts["rule"], 0.0),
            "MSE knapsack": (table_knapsack(problem, self.units, self.rows, "mse"), 0.0),
            "Fisher knapsack": (starts["Fisher knapsack"], 0.0),
            "KL knapsack": (starts["knapsack"], len(self.units) / 2 / options.evaluations),
        }

        fisher = np.array([errors[4] - errors[8] for errors in unit_errors(self.units, self.rows, "fisher")])
        both = np.array(gains) / np.sum(gains) + fisher / fisher.sum()
        found["KL + Fisher knapsack"] = problem.fill(problem.knapsack(both.tolist())), found["KL knapsack"][1]
        draws = [random_genome(problem, rng) for _ in range(options.evaluations)]
        found["random"] = min(draws, key=evaluator.score), 1.0
        seeds = list(starts.values())
        generations = round((options.evaluations - POPULATION) / (POPULATION - 2))
        common: dict[str, Any] = {"generations": generations, "patience": generations + 1}
        settings = GeneticSettings(population=POPULATION, **common)
        evolution = EvolutionSettings(**{**common, "generations": round(options.evaluations / 28)})
        runs: dict[str, AskTell[Any]] = {
            "evolution (1+28)": Evolution(problem, evolution, np.random.default_rng(seed), seeds),
            "plain genetic": GeneticAlgorithm(
                problem, replace(settings, model_share=0.0), np.random.default_rng(seed), seeds
            ),
        }
        plain = replace(settings, model_share=0.0)
        for name in ("plain genetic, then validation", TWO_RUNGS):
            runs[name] = GeneticAlgorithm(problem, plain, np.random.default_rng(seed), seeds)
        two_rungs = KLFitness(evaluator, (max(1, evaluator.windows // 4), evaluator.windows))
        if budget in options.whole:
            runs["search, whole texts"] = GeneticAlgorithm(problem, settings, np.random.default_rng(seed), seeds)
        runs["search"] = GeneticAlgorithm(problem, settings, np.random.default_rng(seed), seeds)
        for name, algorithm in runs.items():
            evaluator.forget()
            before = evaluator.tokens_run
            while not algorithm.done:
                genomes = algorithm.ask()
                if name in ("search", TWO_RUNGS):
                    incumbent = algorithm.best[0] if algorithm.history else None
                    scored = fitness if name == "search" else two_rungs
                    algorithm.tell(*scored.scores(genomes, incumbent, algorithm.complete))
                else:
                    algorithm.tell({genome: evaluator.score(genome) for genome in genomes})
            share = (evaluator.tokens_run - before) / (options.evaluations * evaluator.windows * evaluator.length)
            best = algorithm.best[0]
            if "genetic" in name and "validation" in name:
                ranked = sorted(algorithm.scores, key=lambda genome: (algorithm.scores[genome], genome))
                best = _by_validation([*seeds, *ranked[:FINALISTS]], evaluator, judge)
            if name.startswith("search"):
                best = validated(seeds, algorithm, evaluator, judge).winner
            found[name] = best, share
        by_validation = _by_validation(list(starts.values()), evaluator, judge)
        found["best start, by validation text"] = by_validation, len(self.units) / 2 / options.evaluations
        return found


def _by_validation(genomes: list[Genome], evaluator: KLEvaluator, judge: KLEvaluator) -> Genome:
    """The genome that other text than the search's chooses."""
    unique = list(dict.fromkeys(genomes))
    unseen, seen = (dict(zip(unique, text.losses(unique), strict=True)) for text in (judge, evaluator))
    return choose(unseen, seen).winner


def main() -> int:
    """Run the repeats and print a table."""
    options = parse()
    if options.json:
        check_output(options.json, force=options.force)
    started = time.monotonic()
    bench = Bench(options)
    kept = ("dtype", "evaluations", "seeds", "calib_tokens", "search_tokens", "eval_windows")
    made_by = {
        "model": options.model,
        "device": device_name(bench.device),
        "text": bench.text.record(),
        **{key: getattr(options, key) for key in kept},
    }
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    for seed in range(options.seeds):
        for budget, found in bench.repeat(seed):
            for name, (genome, share) in found.items():
                new = {"method": name, "budget": budget, "kl": [], "tokens": []}
                row = rows.setdefault((name, budget), new)
                row["kl"].append(bench.unseen.score(genome))
                row["tokens"].append(share)
        print(f"repeat {seed + 1} of {options.seeds}: {time.monotonic() - started:.0f} s", flush=True)
        if options.json:
            write_text(options.json, json.dumps({"made_by": made_by, "rows": list(rows.values())}, indent=1))
    ends = {f"all A{bits}": bench.unseen.score((bits,) * len(bench.units)) for bits in (8, 4)}
    about = f"{options.model}, {made_by['device']}, {bench.text.name}, {bench.unseen.windows} windows of {options.ctx}"
    print(f"\n{about}; {', '.join(f'{name} {score:.4f}' for name, score in ends.items())}\n")
    print(table(list(rows.values())))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The ``rows`` of the JSON as Markdown."""
    budgets = sorted({row["budget"] for row in rows})
    cells: list[list[Cell]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["budget"]: row for row in rows if row["method"] == method}
        spreads = [_spread(own[budget]["kl"]) if budget in own else None for budget in budgets]
        cells.append([method, *spreads, f"{mean(share for row in own.values() for share in row['tokens']):.2f}"])
    return markdown_table(["method", *(f"budget {budget:g}" for budget in budgets), "tokens"], cells)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    raise SystemExit(main())
