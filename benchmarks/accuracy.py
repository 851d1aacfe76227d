"""What each step gives: recipe × {W4A16, W4A8, mixed, W4A4} on a real model and text that nothing was chosen on.

    python benchmarks/accuracy.py [--model demo] [--device auto] [--recipes NAME ...] [--json OUT]

For every recipe the model is loaded, prepared as ``mixed_precision_ptq.py`` prepares it, and scored in PyTorch: mean KL
to the unquantised model in nats per token, top-1 agreement, perplexity (the second half of each window is scored).
``mixed`` is the knapsack over measured one-at-a-time KL at the budget. Calibration, search and evaluation never share
text. Recipes are those of ``RECIPES``, from plain rounding to the defaults of each target.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.text import load_text
from halfbyte.calibration.windows import cut, first_scored
from halfbyte.core.device import device_name, resolve_device
from halfbyte.core.files import check_output, write_text
from halfbyte.evaluate.quality import LogitsFile, Quality, live, measure, model_logits, windows_for
from halfbyte.models.layers import layers_of, units_of
from halfbyte.models.loading import find, load
from halfbyte.models.modules import is_tied, vocabulary
from halfbyte.prepare.recipe import TARGETS, Recipe
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.report.tables import Cell, markdown_table, significant
from halfbyte.search.baselines import knapsack_genome
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.problem import Problem
from halfbyte.search.reference import reference
from halfbyte.transforms import expand

PLAIN = Recipe(weights="rtn", clip=False)
SMOOTH = replace(PLAIN, transforms=("smooth",))
ONLINE = replace(PLAIN, transforms=("smooth", "online"))
LEARNED = replace(ONLINE, transforms=("smooth", "online", "learned"), weights="gptq", clip=True)
FOLDED = replace(LEARNED, transforms=("smooth", "r1", "r2"))
SERVED = replace(TARGETS["vllm"], weights="gptq")
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
    "vllm": ("default of vllm, symmetric", SERVED),
    "vllm-asymmetric": ("the same, asymmetric, with A4 ranges", replace(SERVED, symmetric=False, clip=True)),
    "vllm-r4": ("default of vllm, symmetric, R4", SERVED),
}
COLUMNS = ("W4A16", "W4A8", "mixed", "W4A4")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="Hugging Face id, local folder, .gguf file, or demo")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu; everything is computed in fp32")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--budget", type=float, default=0.75, help="of the mixed column")
    parser.add_argument("--text", default="auto", help="auto (wikitext2, else pydoc), wikitext2, pydoc, or a file")
    parser.add_argument("--calib_tokens", type=int, default=32768)
    parser.add_argument("--search_tokens", type=int, default=2048)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="to score")
    parser.add_argument("--json", help="also write the rows here, after each one")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the --json file already")
    parser.add_argument("--force", action="store_true", help="overwrite an existing --json file")
    return parser.parse_args()


class Bench:
    """One model, its text, and the reference's answers."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.device = options, resolve_device(options.device)
        source = self._load()
        self.text = load_text(options.text)
        self.calib, self.search = (
            torch.tensor(cut(ids, options.ctx, max(1, count // options.ctx), spread=True, where=parts[0]))
            for count, parts in ((options.calib_tokens, ("calib",)), (options.search_tokens, ("search", "valid")))
            for text in ["".join(self.text.parts[part] for part in parts)]
            for ids in [source.tokenizer(text, add_special_tokens=False).input_ids]
        )
        self.windows = windows_for(source, self.text.parts["eval"], options.ctx, options.windows, where="eval text")
        self.known = reference(source.model, source.family, self.search, device=self.device)
        self.tied = is_tied(source.model, source.family)
        scored = options.ctx - first_scored(options.ctx) - 1
        self.kept = LogitsFile(scratch / "reference", vocabulary(source.model, source.family), scored)
        source.model.to(self.device)
        self.kept.write(self.windows, model_logits(source.model), "reference")
        self.original = measure(self.windows, iter(self.kept))
        self.made_by = {
            "model": options.model,
            "fingerprint": source.fingerprint,
            "text": self.text.record(),
            "calib_tokens": self.calib.numel(),
            "search_tokens": self.search.numel(),
            "scored_tokens": self.original.tokens,
            "ppl": self.original.ppl,
            "device": device_name(self.device),
        }

    def _load(self) -> Any:
        return load(find(self.options.model), device=torch.device("cpu"), dtype=torch.float32)

    def row(self, name: str) -> dict[str, Any]:
        """Prepare with one recipe and score the four columns."""
        label, recipe = RECIPES[name]
        target = name.partition("-")[0]
        if target in ("gguf", "vllm"):
            transforms = expand("auto", target, tied=self.tied, online=name.endswith("-r4"))
            recipe = replace(recipe, transforms=transforms)
            label += f" ({', '.join(transforms)})"
        source = self._load()
        known = self.known
        for transform in recipe.applied:
            known = transform.reference(known, source.model, source.family)
        started = time.perf_counter()
        made = prepare_(source, self.calib, recipe, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        source.model.to(self.device)
        layers = list(made.layers)
        qualities = {}
        for column, bits in (("W4A16", None), ("W4A8", 8), ("W4A4", 4)):
            qualities[column] = self._score(source, dict.fromkeys(layers, bits))
        units = units_of(layers_of(source.model, source.family), source.family, "fused")
        evaluator = KLEvaluator(source.model, source.family, units, self.search, known)
        base = evaluator.score((8,) * len(units))
        gain = [loss - base for loss in evaluator.one_at_a_time(8, 4)]
        problem = Problem(costs=tuple(unit.macs for unit in units), budget=self.options.budget, priority=tuple(gain))
        genome = problem.fill(knapsack_genome(problem, gain))
        chosen = {layer.name: width for unit, width in zip(units, genome, strict=True) for layer in unit.layers}
        qualities["mixed"] = self._score(source, chosen)
        columns = {column: asdict(qualities[column]) for column in COLUMNS}
        return {"name": name, "recipe": label, "seconds": seconds, "settings": asdict(recipe), **columns}

    def _score(self, source: Any, bits: dict[str, int | None]) -> Quality:
        set_activation_bits_(source.model, bits)
        return measure(self.windows, live(self.windows, model_logits(source.model)), iter(self.kept))


def table(rows: list[dict[str, Any]]) -> str:
    """KL, top-1 and perplexity of every row as Markdown."""
    headers = ["recipe", "time", *(f"{column}: KL, top-1, ppl" for column in COLUMNS)]
    cells: list[list[Cell]] = [
        [
            row["recipe"],
            f"{row['seconds']:.0f} s",
            *(
                f"{significant(row[column]['kld_mean'])}, {100 * row[column]['top1_agreement']:.1f}%, "
                f"{significant(row[column]['ppl'], 4)}"
                for column in COLUMNS
            ),
        ]
        for row in rows
    ]
    return markdown_table(headers, cells)


def main() -> int:
    """Run the recipes and print the table."""
    options = parse()
    output = Path(options.json) if options.json else None
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        print(json.dumps(bench.made_by), flush=True)
        if output and options.resume and output.exists():
            before = json.loads(output.read_text(encoding="utf-8"))
            if before["made_by"] != bench.made_by:
                raise SystemExit(f"{output} was made otherwise: {before['made_by']}")
            rows = {row["name"]: row for row in before["rows"]}
        elif output:
            check_output(output, force=options.force)
        for name in (name for name in options.recipes if name not in rows):
            row = rows[name] = bench.row(name)
            scores = "  ".join(f"{column} {significant(row[column]['kld_mean'])}" for column in COLUMNS)
            print(f"{row['recipe']}: {row['seconds']:.0f} s  {scores}", flush=True)
            if output:
                write_text(output, json.dumps({"made_by": bench.made_by, "rows": list(rows.values())}, indent=1))
    print(f"\n{options.model}, {bench.made_by['device']}, {bench.text.name}, original ppl {bench.original.ppl:.3f}\n")
    print(table([rows[name] for name in RECIPES if name in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
