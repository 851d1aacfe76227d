"""How fast candidates are searched on the shape of Qwen2.5-7B-Instruct, with random W4 codes.

    python benchmarks/search_speed.py [--layers 28] [--modes packed decoded] [--json OUT]
    torchrun --nproc-per-node 2 benchmarks/search_speed.py --modes decoded

Nothing is downloaded or loaded: codes are drawn on the device, and the reference is the same model without activation
quantisation. Random weights say nothing about quality; time and memory are those of the real model. Everything runs
in one process per GPU, one after the other, so ratios compare what ran side by side:

- backbone: the bf16 model's blocks and final norm alone, decoded weights, activations left alone;
- candidates: whole genomes, KL included, as the search measures them;
- search: KL of every unit at A4, then the genetic search with staged texts, as ``mixed_precision_ptq.py`` runs it;
- pure: whether genomes measured in another order and in other company have the same bits.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from halfbyte.search.fitness import KLFitness, stages_of
from halfbyte.search.runner import run_genetic
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from halfbyte.core.device import device_name, peak_memory
from halfbyte.core.distributed import Group, joined
from halfbyte.core.files import check_output, write_text
from halfbyte.models.families import Family, family_of
from halfbyte.models.layers import layers_of, units_of
from halfbyte.quant.int4 import PackedWeight
from halfbyte.quant.quant_linear import InputScheme, SharedInput, replace_linear_, set_activation_bits_
from halfbyte.report.tables import markdown_table
from halfbyte.search.baselines import knapsack_genome, random_genome
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.genetic import GeneticSettings
from halfbyte.search.problem import Problem
from halfbyte.search.reference import Reference, reference

GROUP_SIZE, BITS_STD = 128, 4.6  # standard deviation of codes drawn evenly from -8 to 7


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3584, help="with --intermediate and --vocab: a smaller shape")
    parser.add_argument("--intermediate", type=int, default=18944)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--modes", nargs="+", choices=("packed", "decoded"), default=["packed", "decoded"])
    parser.add_argument("--search", nargs="*", choices=("packed", "decoded"), default=["decoded"], help="search these")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--ga_pop", type=int, default=30)
    parser.add_argument("--ga_gen", type=int, default=26, help="30 + 26 · 28 genomes are 758")
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--force", action="store_true", help="overwrite an existing --json file")
    return parser.parse_args()


def build(options: argparse.Namespace, device: torch.device, *, packed: bool) -> tuple[nn.Module, Family]:
    """The model with random codes on ``device``, block after block; packed leaves the embedding on the host."""
    heads = options.hidden // 128
    config = Qwen2Config(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 7),
        vocab_size=options.vocab,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
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


def timed(device: torch.device, work: Any) -> float:
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


def measure(
    options: argparse.Namespace, device: torch.device, group: Group, known: Reference | None, *, packed: bool
) -> tuple[dict[str, Any], Reference]:
    """Numbers of one mode, and the reference for the next."""
    gc.collect()  # what the last mode left
    model, family = build(options, device, packed=packed)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(options.vocab, (options.windows, options.ctx), generator=generator)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    units = units_of(layers_of(model, family), family, "fused")
    known = known or reference(model, family, tokens, device=device)

    def evaluator() -> KLEvaluator:
        return KLEvaluator(model, family, units, tokens, known, group=group)

    found: dict[str, Any] = {"mode": "packed" if packed else "decoded", "units": len(units)}
    problem = Problem(costs=tuple(unit.macs for unit in units), budget=0.75)
    rng = np.random.default_rng(0)
    genomes = [random_genome(problem, rng) for _ in range(12 * group.size)]
    evaluator().losses(genomes[: 2 * group.size])  # warm
    fresh = evaluator()
    seconds = timed(device, lambda: fresh.losses(genomes))
    found["candidate_tokens_per_second"] = len(genomes) * tokens.numel() / seconds
    again = evaluator().losses(genomes[::-1][: 3 * group.size], [options.windows - 1])
    expected = fresh.losses(genomes[::-1][: 3 * group.size], [options.windows - 1])
    found["pure"] = bool((again == expected).all())
    if not packed:
        found["backbone_tokens_per_second"] = backbone_rate(model, family, tokens, fresh.rows, device)
    if found["mode"] in options.search:
        found |= search(options, evaluator(), problem, device, group)
    found["peak_memory"] = peak_memory(device)
    return found, known


def search(
    options: argparse.Namespace, evaluator: KLEvaluator, problem: Problem, device: torch.device, group: Group
) -> dict[str, Any]:
    """Time of the units' KL and of the genetic search."""
    fitness = KLFitness(evaluator, stages_of(evaluator.windows))
    gains: list[float] = []
    sensitivity = timed(device, lambda: gains.extend(fitness.gains(lambda _: None)))
    problem = Problem(problem.costs, problem.budget, priority=tuple(gains))
    settings = GeneticSettings(population=options.ga_pop, generations=options.ga_gen, patience=options.ga_gen + 1)
    before, evaluations = evaluator.tokens_run, 0

    def run() -> None:
        nonlocal evaluations
        with tempfile.TemporaryDirectory() as folder:
            algorithm = run_genetic(
                problem,
                settings,
                seeds=[problem.fill(knapsack_genome(problem, gains))],
                seed=0,
                fitness=fitness,
                state_file=Path(folder) / "state.json",
                resume=False,
                group=group,
            )
        evaluations = len(algorithm.scores)

    seconds = timed(device, run)
    whole = evaluations * evaluator.windows * evaluator.length
    return {
        "sensitivity_seconds": sensitivity,
        "search_seconds": seconds,
        "evaluations": evaluations,
        "share_of_tokens": (evaluator.tokens_run - before) * group.size / whole,
    }


def main() -> int:
    """Measure the modes and print a table."""
    options = parse()
    if options.json:
        check_output(options.json, force=options.force)
    with joined() as group:
        device = torch.device("cuda", group.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        rows, known = [], None
        for mode in options.modes:
            row, known = measure(options, device, group, known, packed=mode == "packed")
            rows.append(row)
            if group.first:
                print(json.dumps(row), flush=True)
        if not group.first:
            return 0
        made_by = {
            "device": device_name(device),
            "processes": group.size,
            "layers": options.layers,
            "hidden": options.hidden,
            "tokens": options.windows * options.ctx,
            "torch": torch.__version__,
        }
    backbone = next((row["backbone_tokens_per_second"] for row in rows if "backbone_tokens_per_second" in row), None)
    cells = [
        [
            row["mode"],
            round(row["candidate_tokens_per_second"]),
            None if backbone is None else f"{row['candidate_tokens_per_second'] / backbone / group.size:.2f}",
            row.get("sensitivity_seconds"),
            row.get("search_seconds"),
            row.get("evaluations"),
            row.get("share_of_tokens"),
            f"{row['peak_memory'] / 1e9:.2f} GB",
            "yes" if row["pure"] else "NO",
        ]
        for row in rows
    ]
    print(
        f"\n{made_by['device']} × {group.size}, {options.layers} blocks of {options.hidden}"
        + ("" if backbone is None else f", bf16 backbone {backbone:.0f} tokens/s")
        + "\n"
    )
    print(
        markdown_table(
            [
                "weights",
                "candidate tokens/s",
                "of backbone",
                "units' KL (s)",
                "search (s)",
                "genomes",
                "share of tokens",
                "peak memory",
                "pure",
            ],
            cells,
        )
    )
    if options.json:
        write_text(options.json, json.dumps({"made_by": made_by, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
