"""What each step gives: recipe × {W4A16, W4A8, mixed, W4A4} on a real model and text that nothing was chosen on.

    python benchmarks/accuracy.py [--model demo] [--device auto] [--recipes NAME ...] [--tune STEPS] [--json OUT]

For every recipe the model is loaded, prepared as ``mixed_precision_ptq.py`` does it, and scored in PyTorch, in fp32:
mean KL to the unquantised model in nats per token, top-1 agreement, perplexity (the second half of each window is
scored). ``mixed`` is the knapsack over measured one-at-a-time KL at the budget. Calibration, search and evaluation
never share text. Recipes are those of ``RECIPES``, from plain rounding to the defaults of each target. With ``--tune``
each recipe has a second row, in which every column of ``--tune_columns`` is tuned for itself; its time is tuning alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from common import Row, Rows, arguments, load_model, parse, run

from halfbyte.calibration.text import scored_tokens
from halfbyte.core import precision
from halfbyte.core.environment import device_name, resolve_device
from halfbyte.evaluate.quality import LogitsFile, Quality, live, measure, model_logits, windows_for
from halfbyte.models.layers import layers_of, units_of
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied, vocabulary
from halfbyte.options import SearchOptions
from halfbyte.pipeline import TUNE_TOKENS
from halfbyte.plan import Codes
from halfbyte.prepare import token_weights
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.simulation import become_simulation_
from halfbyte.prepare.tune import Judged, tuned_codes
from halfbyte.prepare.walk import Prepared, prepare_
from halfbyte.quant.arithmetics.nvfp4 import GROUP
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.report.tables import Cell, markdown_table, significant
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.reference import reference
from halfbyte.search.sensitivity import activation_problem
from halfbyte.targets import TARGETS

PLAIN = Recipe(weights="rtn", clip=False)
SMOOTH = replace(PLAIN, transforms=("smooth",))
ONLINE = replace(PLAIN, transforms=("smooth", "online"))
LEARNED = replace(ONLINE, transforms=("smooth", "online", "learned"), weights="gptq", clip=True)
FOLDED = replace(LEARNED, transforms=("smooth", "r1", "r2"))
ADA, HOPPER, BLACKWELL = (TARGETS["vllm"].on(name) for name in ("ada", "hopper", "blackwell"))
RECIPES: dict[str, tuple[str, Recipe]] = {
    "plain": ("plain rounding", PLAIN),
    "smoothquant": ("SmoothQuant 0.5", replace(SMOOTH, alpha=0.5)),
    "smooth": ("scales by output error", SMOOTH),
    "online": ("the same + rotations at run time", ONLINE),
    "gptq": ("the same + GPTQ", replace(ONLINE, weights="gptq")),
    "clip": ("the same + A4 ranges by output error", replace(ONLINE, weights="gptq", clip=True)),
    "sim": ("the same + learned (default of sim)", LEARNED),
    "symmetric": ("the same, symmetric activations", replace(LEARNED, symmetric=True)),
    "awq": ("AWQ, folded scales only", replace(SMOOTH, weights="awq", clip=True)),
    "smooth-gptq": ("scales + GPTQ, no rotation", replace(SMOOTH, weights="gptq", clip=True)),
    "r1r2": ("R1 + R2 folded + GPTQ", FOLDED),
    "r1r2r4": ("R1 + R2 folded, R4 + GPTQ", replace(FOLDED, transforms=("smooth", "r1", "r2", "r4"))),
    "gguf": ("default of gguf", replace(FOLDED, scale_bits=8)),  # from here on transforms are the targets' defaults
    "ada": ("vllm on Turing to Ada: integers in groups", replace(ADA.recipe, weights="gptq")),
    "hopper": ("vllm on Hopper: A8 is fp8", replace(HOPPER.recipe, weights="gptq")),
    "blackwell": ("vllm on Blackwell: NVFP4", replace(BLACKWELL.recipe, weights="gptq", group_size=GROUP)),
}
COLUMNS = ("W4A16", "W4A8", "mixed", "W4A4")


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    parser.add_argument(
        "--budget", type=float, default=0.75, help="of the mixed column, where the recipe is of no target"
    )
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="also tune; 96 is what results.md has")
    parser.add_argument("--tune_columns", nargs="+", choices=COLUMNS[1:], default=COLUMNS[1:], metavar="COLUMN")
    parser.add_argument("--power", type=float, default=token_weights.POWER, help="of token weights; 0: all alike")
    parser.add_argument("--no_tf32", action="store_true", help="products in fp32 everywhere")
    parser.add_argument("--seed", type=int, default=0, help="of the words that token weights are drawn from")
    parser.add_argument("--calib_tokens", type=int, default=32768)
    parser.add_argument("--search_tokens", type=int, default=2048)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="to score")
    return parse(parser)


class Bench:
    """One model, its text, and the reference's answers."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.device = options, resolve_device(options.device)
        token_weights.POWER, precision.TF32 = options.power, not options.no_tf32
        loaded, ctx = load_model(options.model, options.text), options.ctx
        source = loaded.source
        self.calib = loaded.windows("calib", ctx, max(1, options.calib_tokens // ctx))
        self.search = loaded.windows(("search", "valid"), ctx, max(1, options.search_tokens // ctx))
        self.windows = windows_for(source, loaded.text.parts["eval"], ctx, options.windows, where="eval text")
        self.reference = reference(source.model, source.family, self.search, device=self.device)
        self.tied = is_tied(source.model, source.family)
        scored = scored_tokens(ctx)
        self.kept = LogitsFile(scratch / "reference", vocabulary(source.model, source.family), scored)
        source.model.to(self.device)
        self.kept.write(self.windows, model_logits(source.model), "reference")
        self.original = measure(self.windows, iter(self.kept))
        self.made_by = {
            "model": options.model,
            **loaded.made_by,
            "calib_tokens": self.calib.numel(),
            "search_tokens": self.search.numel(),
            "power": options.power,
            "seed": options.seed,
            "tf32": not options.no_tf32,
            "scored_tokens": self.original.tokens,
            "ppl": self.original.ppl,
            "device": device_name(self.device),
        }

    @cached_property
    def tune_text(self) -> Judged:
        """What there is of the calibration text, with the unquantised model's answers."""
        loaded, ctx = load_model(self.options.model, self.options.text), self.options.ctx
        tokens, source = loaded.windows("calib", ctx, TUNE_TOKENS // ctx), loaded.source
        return Judged(tokens, reference(source.model, source.family, tokens, device=self.device))

    def rows(self, name: str) -> list[Row]:
        """Prepare with one recipe and score the four columns; the same tuned, if asked for."""
        label, recipe = RECIPES[name]
        target = {"gguf": TARGETS["gguf"], "ada": ADA, "hopper": HOPPER, "blackwell": BLACKWELL}.get(name)
        if target is not None:
            recipe = replace(recipe, transforms=target.transforms(SearchOptions(), tied=self.tied))
            label += f" ({', '.join(recipe.transforms)})"
        source = load_model(self.options.model, self.options.text).source
        norm = source.model.get_parameter(f"{source.family.final_norm}.weight").to(self.device).clone()
        started = time.perf_counter()
        made = prepare_(source, self.calib, recipe, device=self.device, seed=self.options.seed)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        source.model.to(self.device)
        layers = list(made.layers)
        widths = {"W4A16": None, "W4A8": 8, "W4A4": 4}
        there = {column: bits for column, bits in widths.items() if bits is None or bits in recipe.a_bits}
        qualities = {column: self._score(source, dict.fromkeys(layers, bits)) for column, bits in there.items()}
        budget = self.options.budget if target is None else target.default_budget
        turned = norm if "r1" in recipe.transforms else None
        mixed = self._mixed(source, turned, budget, recipe.a_bits)
        qualities["mixed"] = self._score(source, mixed)
        columns = {column: asdict(quality) for column, quality in qualities.items()}
        row: Row = {"name": name, "recipe": label, "seconds": seconds, "settings": asdict(recipe), **columns}
        if not self.options.tune:
            return [row]
        plans = {column: mixed if column == "mixed" else dict.fromkeys(layers, widths[column]) for column in qualities}
        del source
        return [row, {"name": f"{name}+tune", "recipe": "the same + tune", **self._tuned(made, recipe, plans, turned)}]

    def _tuned(
        self, made: Prepared, recipe: Recipe, plans: dict[str, dict[str, int | None]], turned: torch.Tensor | None
    ) -> Row:
        """Every column tuned for itself, and the seconds that one took."""
        text, other = self.tune_text, Judged(self.search, self.reference)
        if turned is not None:
            text, other = (Judged(one.tokens, one.answers.for_rotated(turned)) for one in (text, other))
        qualities: dict[str, object] = {}
        seconds = 0.0
        for column in (column for column in self.options.tune_columns if column in plans):
            started, bits = time.perf_counter(), plans[column]
            source = self._simulation(made.codes, made)
            codes = tuned_codes(
                source, made.codes, bits, recipe.scale_rule, text, other, steps=self.options.tune, seed=0
            )
            seconds = time.perf_counter() - started
            qualities[column] = asdict(self._score(self._simulation(codes or made.codes, made), bits))
        return {"seconds": seconds, "settings": asdict(recipe), **qualities}

    def _simulation(self, codes: Codes, made: Prepared) -> SourceModel:
        source = load_model(self.options.model, self.options.text).source
        become_simulation_(source, codes, made.layers, device=self.device, packed=True)
        source.model.to(self.device)
        return source

    def _mixed(
        self, source: SourceModel, rotated_norm: torch.Tensor | None, budget: float, a_bits: tuple[int, ...]
    ) -> dict[str, int | None]:
        """The knapsack over the KL of single units: layer -> activation bits.

        Args:
            rotated_norm: the final norm's scale, if the residual stream is rotated and the head holds it now.
        """
        answers = self.reference if rotated_norm is None else self.reference.for_rotated(rotated_norm)
        units = units_of(layers_of(source.model, source.family), source.family, "fused")
        menus = [a_bits] * len(units)
        evaluator = KLEvaluator(source.model, source.family, units, self.search, answers, menus)
        base = evaluator.score(evaluator.last_formats)
        gains = [loss - base for loss in evaluator.one_at_a_time()]
        chosen = activation_problem([unit.macs for unit in units], budget, gains, menus).knapsack()
        widths = [a_bits[gene] for gene in chosen]
        return {layer.name: bits for unit, bits in zip(units, widths, strict=True) for layer in unit.layers}

    def _score(self, source: SourceModel, bits: dict[str, int | None]) -> Quality:
        set_activation_bits_(source.model, bits)
        return measure(self.windows, live(self.windows, model_logits(source.model)), iter(self.kept))


def table(rows: Sequence[Row]) -> str:
    """KL, top-1 and perplexity of every row as Markdown."""
    headers = ["recipe", "time", *(f"{column}: KL, top-1, ppl" for column in COLUMNS)]
    cells: list[list[Cell]] = [
        [
            row["recipe"],
            f"{row['seconds']:.0f} s",
            *(_cell(row.get(column)) for column in COLUMNS),
        ]
        for row in rows
    ]
    return markdown_table(headers, cells)


def _cell(quality: dict[str, float] | None) -> str:
    if quality is None:
        return "—"
    shares = f"{significant(quality['kld_mean'])}, {100 * quality['top1_agreement']:.1f}%"
    return f"{shares}, {significant(quality['ppl'], 4)}"


def main() -> int:
    """Run the recipes and print the table."""
    options = options_of()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        print(json.dumps(bench.made_by), flush=True)
        rows = Rows(options, bench.made_by)
        there = {row["name"] for row in rows}
        for name in (name for name in options.recipes if name not in there):
            for row in bench.rows(name):
                rows.add(row)
                scores = [f"{column} {significant(row[column]['kld_mean'])}" for column in COLUMNS if column in row]
                print(f"{row['recipe']}: {row['seconds']:.0f} s  {'  '.join(scores)}", flush=True)
    text = bench.made_by["text"]["name"]
    print(f"\n{options.model}, {bench.made_by['device']}, {text}, original ppl {bench.original.ppl:.3f}\n")
    print(table(sorted(rows, key=lambda row: list(RECIPES).index(row["name"].removesuffix("+tune")))))
    return 0


if __name__ == "__main__":
    run(main)
