"""How fast candidates are searched on the shape of Qwen2.5-7B-Instruct, with random W4 codes.

    python benchmarks/search_speed.py [--layers 28] [--modes packed decoded] [--json OUT]
    torchrun --nproc-per-node 2 benchmarks/search_speed.py --modes decoded

Nothing is downloaded or loaded: codes are drawn on the device, and the reference is the same model without activation
quantisation. Random weights say nothing about quality; time and memory are those of the real model. Everything runs
in one process per GPU, one after the other, so ratios compare what ran side by side:

- backbone: the bf16 model's blocks and final norm alone, decoded weights, activations left alone;
- candidates: whole genomes, KL included, as the search measures them;
- search: KL of every unit at A4, then the genetic search with two rungs of text, as ``mixed_precision_ptq.py`` runs it;
- pure: whether genomes measured in another order and in other company have the same bits.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Row, Rows, arguments, parse, run
from seven_b_shape import SHAPE, shape_of
from torch import nn
from transformers import AutoModelForCausalLM

from halfbyte.core.distributed import joined, processes
from halfbyte.core.environment import device_name, peak_memory
from halfbyte.models.families import Family, family_of
from halfbyte.models.layers import layers_of, units_of
from halfbyte.quant.int4 import PackedWeight
from halfbyte.quant.quant_linear import InputScheme, SharedInput, replace_linear_, set_activation_bits_
from halfbyte.report.tables import Cell, markdown_table, significant
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.genetic import GeneticSettings
from halfbyte.search.problem import Genome, Problem, random_genome
from halfbyte.search.reference import Reference, reference
from halfbyte.search.run import Searchable, search_menu
from halfbyte.search.sensitivity import activation_problem

GROUP_SIZE, BITS_STD = 128, 4.6  # standard deviation of codes drawn evenly from -8 to 7


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__, model=None, device=False, text=None)
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--modes", nargs="+", choices=("packed", "decoded"), default=["packed", "decoded"])
    parser.add_argument("--search", nargs="*", choices=("packed", "decoded"), default=["decoded"], help="search these")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--ga_pop", type=int, default=30)
    parser.add_argument("--ga_gen", type=int, default=26, help="30 + 26 · 28 genomes are 758")
    return parse(parser)


def build(options: argparse.Namespace, device: torch.device, *, packed: bool) -> tuple[nn.Module, Family]:
    """The model with random codes on ``device``, block after block; packed leaves the embedding on the host."""
    config = shape_of(**{**{name: getattr(options, name) for name in SHAPE}, "layers": 1})
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    family, shared, scheme = family_of(config.model_type, where="benchmark"), SharedInput(), InputScheme(a4_clip=0.85)
    template = model.get_submodule(f"{family.blocks}.0")
    holder = model.get_submodule(family.blocks)
    generator = torch.Generator(device).manual_seed(0)
    for index in range(options.layers):
        block = copy.deepcopy(template)
        for part in family.linears:
            out_features, in_features = block.get_submodule(part).weight.shape  # pyright: ignore[reportGeneralTypeIssues]
            codes = torch.randint(
                256, (out_features, in_features // 2), dtype=torch.uint8, device=device, generator=generator
            )
            scales = torch.full((out_features, in_features // GROUP_SIZE), 0.02 / BITS_STD, device=device).half()
            replace_linear_(block, part, PackedWeight(codes, scales), shared, scheme, packed=packed)
        setattr(holder, str(index), block)
    model.config.num_hidden_layers = options.layers
    model.config.layer_types = model.config.layer_types[:1] * options.layers
    if packed:
        model.get_submodule(family.embedding).to("cpu")
    return model, family


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of ``work()``, the device's included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def backbone_rate(model: nn.Module, family: Family, tokens: torch.Tensor, rows: int, device: torch.device) -> float:
    """Tokens per second through the blocks and the final norm, activations left alone."""
    layers = [layer.name for layer in layers_of(model, family)]
    set_activation_bits_(model, dict.fromkeys(layers, None))
    backbone = model.get_submodule(family.blocks.rpartition(".")[0])
    batch = tokens[torch.arange(rows) % len(tokens)].to(device)

    def forward() -> None:
        with torch.no_grad():
            backbone(input_ids=batch, use_cache=False)

    timed(device, forward)
    return batch.numel() / min(timed(device, forward) for _ in range(5))


class Menu(Searchable):
    """Activation bits of the random model, as :class:`halfbyte.menus.activations.ActivationMenu` searches them."""

    name, title, score_label = "activations", "activation bits", "KL, nats per token"

    def __init__(self, evaluator: KLEvaluator) -> None:
        self.on_search_text, self.on_validation_text = evaluator, None
        self.set_gains([0.0] * len(evaluator.units))

    def set_gains(self, gains: list[float]) -> None:
        """What each unit gains by A8 alone."""
        self.problem = activation_problem([unit.macs for unit in self.on_search_text.units], 0.75, gains)

    def starts(self, problem: Problem) -> dict[str, Genome]:
        return {"KL knapsack": problem.knapsack()}

    def choice(self, genome: Genome) -> dict[str, int | str]:
        units = self.on_search_text.units
        return {unit.name: (4, 8)[gene] for unit, gene in zip(units, genome, strict=True)}


def measure(
    options: argparse.Namespace, device: torch.device, mode: str, known: Reference | None
) -> tuple[Row, Reference]:
    """Numbers of one mode, and the reference for the next."""
    gc.collect()  # what the last mode left
    model, family = build(options, device, packed=mode == "packed")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(options.vocab, (options.windows, options.ctx), generator=generator)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    units = units_of(layers_of(model, family), family, "fused")
    answers = known or reference(model, family, tokens, device=device)

    def evaluator() -> KLEvaluator:
        return KLEvaluator(model, family, units, tokens, answers)

    menu, size = Menu(evaluator()), processes().size
    rng = np.random.default_rng(0)
    genomes = [random_genome(menu.problem, rng) for _ in range(12 * size)]
    evaluator().losses(genomes[: 2 * size])  # warm
    fresh = evaluator()
    seconds = timed(device, lambda: fresh.losses(genomes))
    few, last = genomes[::-1][: 3 * size], [options.windows - 1]
    found: Row = {
        "mode": mode,
        "units": len(units),
        "candidate_tokens_per_second": len(genomes) * tokens.numel() / seconds,
        "pure": bool((evaluator().losses(few, last) == fresh.losses(few, last)).all()),
    }
    if mode == "decoded":
        found["backbone_tokens_per_second"] = backbone_rate(model, family, tokens, fresh.rows, device)
    if mode in options.search:
        found |= search(options, menu, device)
    return {**found, "peak_memory": peak_memory(device)}, answers


def search(options: argparse.Namespace, menu: Menu, device: torch.device) -> Row:
    """Time of the units' KL and of the genetic search."""
    evaluator = menu.on_search_text
    gains: list[float] = []

    def alone() -> None:
        base = evaluator.score((1,) * len(evaluator.units))
        gains.extend(loss - base for loss in evaluator.one_at_a_time())

    sensitivity = timed(device, alone)
    menu.set_gains(gains)
    settings = GeneticSettings(population=options.ga_pop, generations=options.ga_gen, patience=options.ga_gen + 1)
    before, evaluations = evaluator.tokens_run, 0

    def genetic() -> None:
        nonlocal evaluations
        with tempfile.TemporaryDirectory() as folder:
            found = search_menu(menu, settings, seed=0, state_file=Path(folder) / "state.json", resume=False)
        evaluations = found.evaluations

    seconds = timed(device, genetic)
    whole = evaluations * evaluator.windows * evaluator.length
    return {
        "sensitivity_seconds": sensitivity,
        "search_seconds": seconds,
        "evaluations": evaluations,
        "share_of_tokens": (evaluator.tokens_run - before) * processes().size / whole,
    }


def table(rows: list[Row], size: int) -> str:
    """The rows of ``size`` processes as Markdown."""
    backbone = next((row["backbone_tokens_per_second"] for row in rows if "backbone_tokens_per_second" in row), None)
    headers = ["weights", "candidate tokens/s", "of backbone", "units' KL (s)", "search (s)", "genomes"]
    cells: list[list[Cell]] = [
        [
            row["mode"],
            round(row["candidate_tokens_per_second"]),
            None if backbone is None else f"{row['candidate_tokens_per_second'] / backbone / size:.2f}",
            significant(row.get("sensitivity_seconds")),
            significant(row.get("search_seconds")),
            row.get("evaluations"),
            significant(row.get("share_of_tokens")),
            f"{row['peak_memory'] / 1e9:.2f} GB",
            "yes" if row["pure"] else "NO",
        ]
        for row in rows
    ]
    return markdown_table([*headers, "share of tokens", "peak memory", "pure"], cells)


def main() -> int:
    """Measure the modes and print a table."""
    options = options_of()
    with joined() as group:
        device = torch.device("cuda", group.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not group.first:
            options.json = None
        made_by = {
            "device": device_name(device),
            "processes": group.size,
            "layers": options.layers,
            "hidden": options.hidden,
            "tokens": options.windows * options.ctx,
            "torch": torch.__version__,
        }
        rows, known = Rows(options, made_by), None
        there = {row["mode"] for row in rows}
        for mode in (mode for mode in options.modes if mode not in there):
            row, known = measure(options, device, mode, known)
            rows.add(row)
            if group.first:
                print(json.dumps(row), flush=True)
        if group.first:
            print(f"\n{made_by['device']} × {group.size}, {options.layers} blocks of {options.hidden}\n")
            print(table(rows.rows, group.size))
    return 0


if __name__ == "__main__":
    run(main)
