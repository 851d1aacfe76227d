"""Who chooses best which units get 8 bits: every method with the same number of evaluations, judged on unseen text.

    python benchmarks/search_quality.py [--model demo] [--device auto] [--budgets 0.6 0.75 0.9] [--json OUT]

The model is prepared once, as ``mixed_precision_ptq.py --target sim`` does it. Each of ``--seeds`` repeats draws
its own windows of the search and validation text and its own random numbers; what is printed is the mean KL (nats per
token) on the evaluation text, which no method has seen, and the standard deviation over the repeats.

- random: the best of ``--evaluations`` random genomes on the search text;
- rule, MSE knapsack, Fisher knapsack: no evaluations; the sensitivity rule, and knapsacks over layer errors;
- KL knapsack, KL + Fisher knapsack: one evaluation per unit, of half of the blocks on average;
- best start: of rule and knapsacks, the one that the validation text chooses;
- genetic: the genetic algorithm from the same starts, every genome on the whole search text;
- genetic + validation: its finalists and the starts, chosen between by validation text;
- search: what the command does: the same with two rungs of text.

``tokens`` is what was read of the search text, as a share of ``--evaluations`` whole texts; the genetic rows start from
knapsacks, whose share comes on top.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from common import Row, Rows, arguments, load_model, parse, run

from halfbyte.core.environment import device_name, resolve_device, resolve_dtype
from halfbyte.menus import Model, Setting
from halfbyte.menus.activations import ActivationMenu
from halfbyte.models.estimate import with_tokens
from halfbyte.options import SearchOptions
from halfbyte.report.tables import Cell, markdown_table
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.genetic import GeneticAlgorithm, GeneticResult, GeneticSettings
from halfbyte.search.problem import Genome, random_genome
from halfbyte.search.reference import Reference, reference
from halfbyte.search.run import FINALISTS, search_menu
from halfbyte.search.sensitivity import activation_problem
from halfbyte.search.validate import choose
from halfbyte.targets import TARGETS
from halfbyte.workdir import Workdir

START_ROWS = ("rule", "KL knapsack", "Fisher knapsack", "KL + Fisher knapsack")  # as the menu calls its starts
GENETIC_ROWS = ("genetic", "genetic + validation")
METHODS = ("random", "rule", "MSE knapsack", *START_ROWS[1:], "best start", *GENETIC_ROWS, "search")
PARTS = ("search", "valid", "eval")

EMPTY: Row = {"kl": []}
Found = tuple[Genome, float]  # and the share of tokens that was read for it


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="fp32", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.6, 0.75, 0.9])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=240)
    parser.add_argument("--population", type=int, default=SearchOptions().ga_pop)
    parser.add_argument("--calib_tokens", type=int, default=0, help="0 is the command's default on the device")
    parser.add_argument("--search_tokens", type=int, default=0, help="the same")
    parser.add_argument("--eval_windows", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=512)
    return parse(parser)


class Bench:
    """The command's menu over a prepared model, and the unquantised model's answers on the text that is used."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device)
        asked = SearchOptions(
            model_id=options.model,
            target="sim",
            codes="decoded",
            ctx=options.ctx,
            calib_tokens=options.calib_tokens,
            search_tokens=options.search_tokens,
        )
        self.options, self.device, self.scratch = options, device, scratch
        self.asked = with_tokens(asked, device)
        loaded = load_model(options.model, options.text, dtype)
        source = loaded.source
        self.windows = {part: loaded.windows(part, options.ctx) for part in PARTS}
        self.windows["eval"] = self.windows["eval"][: options.eval_windows]
        self.drawn = [self._draw(np.random.default_rng(seed)) for seed in range(options.seeds)]
        used = {part: sorted({at for drawn in self.drawn for at in drawn[part]}) for part in ("valid", "search")}
        self.drawn = [{part: [used[part].index(at) for at in drawn[part]] for part in used} for drawn in self.drawn]
        self.windows |= {part: self.windows[part][rows] for part, rows in used.items()}
        self.references = {
            part: reference(source.model, source.family, windows, device=device)
            for part, windows in self.windows.items()
        }
        self.menu = ActivationMenu(Setting(self.asked, TARGETS["sim"], source.origin, device, dtype))
        self.menu.check(source)
        calib = loaded.windows("calib", options.ctx, max(1, self.asked.calib_tokens // options.ctx))
        one = {part: self.windows[part][:1] for part in ("search", "valid")}  # each repeat draws its own
        answers = reference(source.model, source.family, torch.cat(list(one.values())), device=device)
        with Workdir(scratch / "plan.json", {}, resume=False) as workdir:
            self.menu.prepare(Model(source, {"calib": calib, **one}, answers, workdir))
        self.source = source
        self.unseen = self.evaluator(range(len(self.windows["eval"])), "eval")
        self.made_by = {
            "model": options.model,
            "device": device_name(device),
            **loaded.made_by,
            **{name: getattr(options, name) for name in ("dtype", "ctx", "evaluations", "population")},
            "calib_tokens": calib.numel(),
            "search_tokens": self.asked.search_tokens,
            "eval_windows": self.unseen.windows,
        }

    def _draw(self, rng: np.random.Generator) -> dict[str, list[int]]:
        """The windows of one repeat."""
        count = max(1, self.asked.search_tokens // self.options.ctx)
        return {part: sorted(rng.permutation(len(self.windows[part]))[:count].tolist()) for part in ("valid", "search")}

    def evaluator(self, chosen: Sequence[int], part: str) -> KLEvaluator:
        """Measures genomes on the ``chosen`` windows of a part."""
        known, rows = self.references[part], torch.tensor(list(chosen))
        there = rows.to(known.projected.device)
        answers = Reference(known.projected[there], known.negentropy[there])
        model = self.source.model
        return KLEvaluator(model, self.source.family, self.menu.units, self.windows[part][rows], answers)

    def draw(self, seed: int) -> None:
        """Give the menu windows and losses of single units of its own for one repeat."""
        valid, search = (self.evaluator(self.drawn[seed][part], part) for part in ("valid", "search"))
        self.menu.on_validation_text, self.menu.on_search_text = valid, search
        self.gains = self.menu._gains()

    def found(self, seed: int, budget: float, methods: Sequence[str]) -> dict[str, Found]:
        """Method -> its genome, and its share of tokens, for one repeat at one budget."""
        menu, options = self.menu, self.options
        macs = [unit.macs for unit in menu.units]
        menu.problem = activation_problem(macs, budget, self.gains)
        starts = menu.starts(menu.problem)
        errors = menu._table_gains("mse")
        of_units = len(menu.units) / 2 / options.evaluations
        generations = max(1, round((options.evaluations - options.population) / (options.population - 2)))
        settings = GeneticSettings(population=options.population, generations=generations)
        found: dict[str, Found] = {
            "MSE knapsack": (menu.problem.with_losses([(error, 0.0) for error in errors]).knapsack(), 0.0),
            "best start": (self.validated(starts.values()), of_units),
        }
        for label, genome in starts.items():
            found[label] = genome, of_units if label.startswith("KL") else 0.0
        if "random" in methods:
            found["random"] = self.read(lambda: self.best_of_random(np.random.default_rng(seed)))
        if set(methods) & set(GENETIC_ROWS):
            runs: list[GeneticResult] = []

            def genetic() -> Genome:
                runs.append(GeneticAlgorithm(menu.problem, settings, seed, list(starts.values())).run(self.scores))
                return runs[0].best

            found["genetic"] = self.read(genetic)
            scores = runs[0].scores
            ranked = sorted(scores, key=lambda genome: (scores[genome], genome))[:FINALISTS]
            found["genetic + validation"] = self.validated([*starts.values(), *ranked]), found["genetic"][1]
        if "search" in methods:
            state = self.scratch / "genetic.json"
            found["search"] = self.read(
                lambda: search_menu(menu, settings, seed=seed, state_file=state, resume=False).genome
            )
        return {method: found[method] for method in methods if method in found}

    def read(self, search: Callable[[], Genome]) -> Found:
        """What ``search`` finds, and the share of tokens that it reads of the search text."""
        scorer = self.menu.on_search_text
        assert isinstance(scorer, KLEvaluator)
        scorer.forget()
        before = scorer.tokens_run
        genome = search()
        whole = self.options.evaluations * scorer.windows * scorer.length
        return genome, (scorer.tokens_run - before) / whole

    def scores(self, genomes: Sequence[Genome], best: Genome | None = None) -> dict[Genome, float]:
        """KL of each genome on the whole search text."""
        assert self.menu.on_search_text is not None
        return {genome: self.menu.on_search_text.score(genome) for genome in genomes}

    def best_of_random(self, rng: np.random.Generator) -> Genome:
        """The best of so many random genomes."""
        scores = self.scores([random_genome(self.menu.problem, rng) for _ in range(self.options.evaluations)])
        return min(scores, key=lambda genome: (scores[genome], genome))

    def validated(self, genomes: Iterable[Genome]) -> Genome:
        """The genome that the validation text chooses, as the command does it."""
        texts = self.menu.on_validation_text, self.menu.on_search_text
        candidates = list(dict.fromkeys(genomes))
        validation, search = (
            dict(zip(candidates, text.losses(candidates), strict=True)) for text in texts if text is not None
        )
        return choose(validation, search).winner


def main() -> int:
    """Run the repeats and print a table."""
    options = options_of()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as scratch:
        bench = Bench(options, Path(scratch))
        rows = Rows(options, bench.made_by)
        for seed in range(options.seeds):
            # A row has one value per repeat, in order; one that was resumed may have it already.
            there = {(row["method"], row["budget"]): row for row in rows}
            missing = {
                budget: [name for name in options.methods if seed >= len(there.get((name, budget), EMPTY)["kl"])]
                for budget in options.budgets
            }
            if any(missing.values()):
                bench.draw(seed)
            for budget, methods in missing.items():
                for name, (genome, share) in bench.found(seed, budget, methods).items() if methods else ():
                    if (name, budget) not in there:
                        there[name, budget] = {"method": name, "budget": budget, "kl": [], "tokens": []}
                        rows.rows.append(there[name, budget])
                    there[name, budget]["kl"].append(bench.unseen.score(genome))
                    there[name, budget]["tokens"].append(share)
            rows.keep()
            print(f"repeat {seed + 1} of {options.seeds}: {time.monotonic() - started:.0f} s", flush=True)
        ends = {label: bench.unseen.score(genome) for label, genome in bench.menu.ends(bench.menu.problem).items()}
    text = f"{bench.made_by['text']['name']}, {bench.unseen.windows} windows of {options.ctx}"
    print(f"\n{options.model}, {bench.made_by['device']}, {text}; ", end="")
    print(", ".join(f"{name} {score:.4f}" for name, score in ends.items()))
    print(f"\n{table(rows.rows)}")
    return 0


def table(rows: Sequence[Row]) -> str:
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
    run(main)
