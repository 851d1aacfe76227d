"""The stages of a search as functions, each leaving a file that the next one, or ``--resume``, starts from.

load → reference → transforms, W4 codes, layer sensitivity → KL per unit → genetic search → plan
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.gradients import output_gradient_power
from halfbyte.calibration.self_written import write_with
from halfbyte.calibration.text import Text, load_text
from halfbyte.calibration.windows import cut
from halfbyte.errors import HalfbyteError
from halfbyte.export.gguf import check_exportable
from halfbyte.export.plan_file import check_suffix, codes_path, save_plan
from halfbyte.files import check_output, sha256, write_text
from halfbyte.formats.int_group import fitting_group_size
from halfbyte.models.device import peak_memory, resolve_device, resolve_dtype
from halfbyte.models.estimate import check_memory, estimate_search
from halfbyte.models.loading import SourceModel, find, layers_of, load, units_of
from halfbyte.models.modules import is_tied
from halfbyte.naming import short_name
from halfbyte.options import SearchOptions
from halfbyte.prepare.recipe import Recipe, recipe_of
from halfbyte.prepare.walk import Prepared, load_prepared_, prepare_, save_prepared
from halfbyte.progress import Progress, Reporter, silent
from halfbyte.provenance import made_with
from halfbyte.report.plots import convergence_plot, sensitivity_heatmap
from halfbyte.report.tables import csv_text
from halfbyte.search.baselines import all_choice, knapsack_genome, rule_genome
from halfbyte.search.evaluator import KLEvaluator, Reference, reference
from halfbyte.search.genetic import GeneticSettings
from halfbyte.search.problem import Genome, Problem
from halfbyte.search.runner import run_genetic
from halfbyte.search.sensitivity import LayerSensitivity, unit_errors, unit_ratios
from halfbyte.spec import Layer, Outcome, Plan, Unit, mean_bits_fraction
from halfbyte.stages import RECORD, Stages, refuse_waiting, work_folder

FISHER_WINDOWS = 8  # for loss gradients


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves.

    Attributes:
        plan: the winner.
        outcomes: one row per layer, what was asked and what was done.
        sensitivity: layer name -> measured errors.
        scores: name of a fixed allocation ("all A8", "all A4", "rule", "knapsack", "plan") -> fitness.
        history: one dict per generation.
        files: everything written, in order.
        peak_memory: most bytes allocated on the device.
        preparation_memory: the same until the W4 codes stood.
    """

    plan: Plan
    outcomes: list[Outcome]
    sensitivity: dict[str, LayerSensitivity]
    scores: dict[str, float]
    history: list[dict[str, Any]]
    files: list[Path]
    peak_memory: int
    preparation_memory: int


def check_search_options(options: SearchOptions) -> None:
    """Refuse, before any work, values that cannot be right."""
    if not 0.5 <= options.target_compression <= 1.0:
        raise HalfbyteError(
            "budget is out of range", where="--target_compression", expected="0.5 (all A4) to 1.0 (all A8)",
            got=options.target_compression,
        )  # fmt: skip
    for flag in ("ga_pop", "ga_gen", "group_size", "ctx", "calib_tokens", "search_tokens"):
        if getattr(options, flag) < 1:
            raise HalfbyteError("must be positive", where=f"--{flag}", got=getattr(options, flag))
    check_suffix(Path(options.output))
    recipe_of(options, tied=False)


def search(options: SearchOptions, report: Reporter = silent) -> SearchResult:
    """Run the whole search and write the plan, its codes and its reports' data.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    check_search_options(options)
    output = check_output(options.output, force=options.force)
    unfinished = options.resume and (work_folder(output) / RECORD).exists()
    for path in (codes_path(output), *_reports(output)):
        check_output(path, force=options.force or unfinished)
    if not options.resume and not options.force:
        refuse_waiting(output)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    origin = find(options.model_id, trust_remote_code=options.trust_remote_code)
    tokens = max(options.calib_tokens, options.search_tokens)
    fisher = options.fitness == "fisher"
    need = estimate_search(origin.config, origin.family, dtype, tokens, options.ctx, gradients=fisher)
    check_memory(need, device)

    report(Progress("load model", 0, 1, options.model_id))
    source = load(origin, device=torch.device("cpu"), dtype=dtype)
    recipe = recipe_of(options, tied=is_tied(source.model, source.family))
    layers = layers_of(source.model, source.family)
    units = units_of(layers, source.family, options.granularity)
    if options.target == "gguf":
        _check_gguf_target(source, layers, options.group_size)
    text, calib_tokens, search_tokens = _texts(source, options, device)
    used = {"calib_tokens": calib_tokens.numel(), "search_tokens": search_tokens.numel()}
    about = f"{len(layers)} linear layers, {len(units)} units, text {text.name}: "
    report(Progress("load model", 1, 1, about + ", ".join(f"{count} {name}" for name, count in used.items())))
    with Stages(output, _settings(options, source, text, device), resume=options.resume) as stages:
        known = []
        if options.fitness == "kl":
            known = reference(source.model, source.family, search_tokens, device=device)
            if "r1" in recipe.transforms:
                norm = source.model.get_parameter(f"{source.family.final_norm}.weight").to(device)
                known = [batch.for_rotated(norm) for batch in known]
        prepared = load_prepared_(source, stages, recipe, device=device)
        if prepared is None:
            # MPS has neither fp64 nor the factorisations of GPTQ
            where = torch.device("cpu") if device.type == "mps" else device
            prepared = prepare_(source, calib_tokens, recipe, report, device=where)
            save_prepared(stages, prepared)
        preparation_memory = peak_memory(device)
        source.model.to(device)
        if fisher:
            _measure_gradients_(prepared, source, layers, calib_tokens, report)
        score, unit_gain = _fitness(source, units, search_tokens, known, prepared.sensitivity, options, stages, report)

        problem = Problem(
            costs=tuple(unit.macs for unit in units), budget=options.target_compression, priority=tuple(unit_gain)
        )
        seeds = {
            "rule": _rule(problem, units, unit_ratios(units, prepared.sensitivity)),
            "knapsack": problem.fill(knapsack_genome(problem, unit_gain)),
        }
        fixed = {"all A8": all_choice(problem, 8), "all A4": all_choice(problem, 4), **seeds}
        scores = stages.value("fixed_scores", lambda: {name: score(genome) for name, genome in fixed.items()})
        algorithm = run_genetic(
            problem,
            GeneticSettings(population=options.ga_pop, generations=options.ga_gen),
            seeds=list(seeds.values()),
            seed=options.seed,
            score=score,
            state_file=stages.folder / "genetic.json",
            resume=stages.resumed,
            report=report,
        )
        best, best_score = algorithm.best
        scores["plan"] = best_score
        plan, outcomes = _plan(
            options, recipe, source, units, best, prepared, text, scores, algorithm.history, stages, used
        )
        files = _write(output, plan, outcomes, prepared.sensitivity, scores, algorithm.history, stages)
        return SearchResult(
            plan, outcomes, prepared.sensitivity, scores, algorithm.history, files, peak_memory(device),
            preparation_memory,
        )  # fmt: skip


def _check_gguf_target(source: SourceModel, layers: list[Layer], group_size: int) -> None:
    """Say before the search what the export could not write."""
    check_exportable(source)
    for layer in layers:
        group = fitting_group_size(layer.in_features, group_size)
        if group % 32:
            raise HalfbyteError(
                "Q4_0 blocks need groups of 32 or a multiple", where=layer.name, got=group,
                fix="use --group_size 128, or --target sim for this model",
            )  # fmt: skip


def _texts(
    source: SourceModel, options: SearchOptions, device: torch.device
) -> tuple[Text, torch.Tensor, torch.Tensor]:
    def written_by_model() -> str:
        source.model.to(device)
        text = write_with(source.model, source.tokenizer, seed=options.seed)
        source.model.to("cpu")
        return text

    text = load_text(options.calib, written_by_model=written_by_model)
    found = {}
    for part, tokens in (("calib", options.calib_tokens), ("search", options.search_tokens)):
        ids = source.tokenizer(text.parts[part], add_special_tokens=False).input_ids
        length = min(options.ctx, tokens)
        windows = cut(ids, length, max(1, tokens // length), spread=True, where=f"{text.name} ({part} part)")
        found[part] = torch.tensor(windows)
    return text, found["calib"], found["search"]


def _settings(options: SearchOptions, source: SourceModel, text: Text, device: torch.device) -> dict[str, Any]:
    ignored = ("resume", "force", "json", "output", "device", "trust_remote_code")
    settings = {key: value for key, value in asdict(options).items() if key not in ignored}
    return {**settings, "device": device.type, "fingerprint": source.fingerprint, "text": text.record()}


def _measure_gradients_(
    prepared: Prepared, source: SourceModel, layers: list[Layer], tokens: torch.Tensor, report: Reporter
) -> None:
    """Add the loss gradients at the W4 simulation's outputs, which transforms have scaled, to the sensitivity."""
    windows = tokens[:FISHER_WINDOWS]
    power: dict[str, float] = {}
    for done, power in enumerate(output_gradient_power(source.model, layers, windows), start=1):  # noqa: B007
        report(Progress("loss gradients", done, len(windows), f"window {done}"))
    for name, row in prepared.sensitivity.items():
        prepared.sensitivity[name] = replace(row, grad_power=power[name])


def _fitness(
    source: SourceModel,
    units: list[Unit],
    tokens: torch.Tensor,
    known: list[Reference],
    sensitivity: dict[str, LayerSensitivity],
    options: SearchOptions,
    stages: Stages,
    report: Reporter,
) -> tuple[Callable[[Genome], float], list[float]]:
    """The score to minimise, and what each unit gains by A8 on its own."""
    if options.fitness == "kl":
        evaluator = KLEvaluator(source.model, source.family, units, tokens, known)

        def measure() -> dict[str, Any]:
            base = evaluator.score([8] * len(units))
            losses = []
            for loss in evaluator.one_at_a_time(8, 4):
                losses.append(loss)
                report(Progress("KL of each unit at A4", len(losses), len(units), units[len(losses) - 1].name))
            return {"base": base, "one_at_a_time": losses}

        measured = stages.value("unit_kl", measure)
        return cache(evaluator.score), [loss - measured["base"] for loss in measured["one_at_a_time"]]
    tables = unit_errors(units, sensitivity, options.fitness)

    def score(genome: Genome) -> float:
        return sum(table[bits] for table, bits in zip(tables, genome, strict=True))

    return score, [table[4] - table[8] for table in tables]


def _rule(problem: Problem, units: list[Unit], ratios: list[float]) -> Genome:
    """A8 where the MSE ratio is above its threshold; brought to the budget by the same ratios, not by KL."""
    last = max(unit.block for unit in units)
    genome = rule_genome(problem, ratios, [unit.block in (0, last) for unit in units])
    by_ratio = replace(problem, priority=tuple(ratios))
    return by_ratio.fill(by_ratio.repair(genome))


def _plan(
    options: SearchOptions,
    recipe: Recipe,
    source: SourceModel,
    units: list[Unit],
    genome: Genome,
    prepared: Prepared,
    text: Text,
    scores: dict[str, float],
    history: list[dict[str, Any]],
    stages: Stages,
    used: dict[str, int],
) -> tuple[Plan, list[Outcome]]:
    bits = {layer.name: width for unit, width in zip(units, genome, strict=True) for layer in unit.layers}
    entries, outcomes = {}, []
    for name, made in prepared.layers.items():
        entries[name] = replace(made, a_bits=bits[name])
        asked, done = f"W4 g{options.group_size}", f"W{made.w_bits} g{made.group_size} A{bits[name]}"
        outcomes.append(Outcome(name, asked, done, made.note))
    plan = Plan(
        model_id=options.model_id,
        fingerprint=source.fingerprint,
        target=options.target,
        granularity=options.granularity,
        layers=entries,
        budget_asked=options.target_compression,
        budget_reached=mean_bits_fraction(units, genome),
        transforms=recipe.transforms,
        weights=options.weights,
        text=text.record(),
        search={
            "algorithm": "genetic",
            "fitness": options.fitness,
            "population": options.ga_pop,
            "generations": len(history),
            **used,
            "ctx": options.ctx,
            "alpha": options.alpha,
            "channel_scales": prepared.scales,
            "scores": scores,
        },
        seed=options.seed,
        versions=made_with(source),
        codes_sha256=sha256(stages.codes),
    )
    return plan, outcomes


def _write(
    output: Path,
    plan: Plan,
    outcomes: list[Outcome],
    sensitivity: dict[str, LayerSensitivity],
    scores: dict[str, float],
    history: list[dict[str, Any]],
    stages: Stages,
) -> list[Path]:
    """Write the reports, then the codes, then the plan, so that a plan that exists is complete."""
    rows = [
        {**asdict(row), "ratio": row.ratio, "a_bits": plan.layers[row.layer].a_bits} for row in sensitivity.values()
    ]
    made_by = {"plan": plan.hash, "model": plan.model_id, "text": dict(plan.text), "seed": plan.seed, **plan.versions}
    named = dict(zip(_REPORTS, _reports(output), strict=True))
    write_text(named["sensitivity.json"], json.dumps({"made_by": made_by, "layers": rows}, indent=1))
    write_text(named["sensitivity.csv"], csv_text(list(rows[0]), [list(row.values()) for row in rows]))
    write_text(
        named["outcome.csv"], csv_text(list(asdict(outcomes[0])), [list(asdict(row).values()) for row in outcomes])
    )
    write_text(
        named["history.json"], json.dumps({"made_by": made_by, "scores": scores, "generations": history}, indent=1)
    )
    _draw(named["sensitivity.png"], named["convergence.png"], plan, rows, scores, history)
    codes = codes_path(output)
    stages.codes.replace(codes)
    try:
        save_plan(output, plan)
    except HalfbyteError:
        codes.replace(stages.codes)  # a resumed run starts from here
        raise
    return [output, codes, *named.values()]


_REPORTS = (
    "sensitivity.json",
    "sensitivity.csv",
    "sensitivity.png",
    "outcome.csv",
    "history.json",
    "convergence.png",
)


def score_label(fitness: str) -> str:
    """What a score of this fitness is, with its unit."""
    return {
        "kl": "KL(reference ‖ quantised), nats per token",
        "fisher": "Fisher-weighted squared error",
        "mse": "MAC-weighted mean squared error",
    }[fitness]


def _reports(output: Path) -> list[Path]:
    return [output.with_name(f"{output.stem}.{kind}") for kind in _REPORTS]


def _draw(
    heatmap: Path,
    convergence: Path,
    plan: Plan,
    rows: list[dict[str, Any]],
    scores: dict[str, float],
    history: list[dict[str, Any]],
) -> None:
    kinds = list(dict.fromkeys(row["layer"].rpartition(".")[2] for row in rows))
    ratios = [[row["ratio"] for row in rows[at : at + len(kinds)]] for at in range(0, len(rows), len(kinds))]
    bits = [[row["a_bits"] for row in rows[at : at + len(kinds)]] for at in range(0, len(rows), len(kinds))]
    name = short_name(plan.model_id)
    sensitivity_heatmap(
        heatmap, kinds, list(range(len(ratios))), ratios, title=f"{name}: what 4-bit activations cost", chosen_bits=bits
    )
    baselines = {label: score for label, score in scores.items() if label != "plan"}
    convergence_plot(
        convergence,
        history,
        baselines=baselines,
        title=f"{name}: genetic search, budget {plan.budget_asked:g}",
        score_label=score_label(plan.search["fitness"]),
    )
