"""What a search leaves behind: the plan, its codes, and its reports as JSON, CSV and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.export.plan_file import codes_path, save_plan
from halfbyte.files import sha256, write_text
from halfbyte.models.loading import SourceModel
from halfbyte.naming import short_name
from halfbyte.options import SearchOptions
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import Prepared
from halfbyte.provenance import made_with
from halfbyte.report.front import front_plot
from halfbyte.report.plots import convergence_plot, sensitivity_heatmap
from halfbyte.report.tables import csv_text
from halfbyte.search.problem import Genome
from halfbyte.spec import Outcome, Plan, Unit, mean_bits_fraction
from halfbyte.stages import Stages

REPORTS = (
    "sensitivity.json",
    "sensitivity.csv",
    "sensitivity.png",
    "outcome.csv",
    "history.json",
    "convergence.png",
)
FRONT_REPORTS = ("front.json", "front.csv", "front.png")


@dataclass(frozen=True)
class Found:
    """What the search came to.

    Attributes:
        genome: the winner.
        scores: name of an allocation ("all A8", "all A4", "rule", "knapsack", "plan") -> fitness on the search text.
        history: one dict per generation.
        about: numbers for the plan and the reports: evaluations, noise floor, KL on the validation text.
    """

    genome: Genome
    scores: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontPoint:
    """The best allocation found for one budget.

    Attributes:
        budget: asked, mean activation bits / 8.
        mean_bits: reached, weighted by multiply-accumulates.
        kl_search, kl_validation: of the allocation, nats per token.
        kl_knapsack: on the validation text, of the knapsack over one-at-a-time KL at the same budget.
        noise_floor: standard error of a difference between two finalists on the validation text.
        bits: unit -> activation bits.
    """

    budget: float
    mean_bits: float
    kl_search: float
    kl_validation: float
    kl_knapsack: float
    noise_floor: float
    bits: dict[str, int]


def score_label(fitness: str) -> str:
    """What a score of this fitness is, with its unit."""
    return {
        "kl": "KL(reference ‖ quantised), nats per token",
        "fisher": "Fisher-weighted squared error",
        "mse": "MAC-weighted mean squared error",
    }[fitness]


def report_paths(output: Path, *, front: bool = False) -> list[Path]:
    """Where the reports of the plan at ``output`` go."""
    return [output.with_name(f"{output.stem}.{kind}") for kind in (*REPORTS, *(FRONT_REPORTS if front else ()))]


def make_plan(
    options: SearchOptions, recipe: Recipe, source: SourceModel, units: Sequence[Unit], found: Found,
    prepared: Prepared, text: Mapping[str, Any], codes: Path,
) -> tuple[Plan, list[Outcome]]:  # fmt: skip
    """The plan of the winner, and per layer what was asked and what was done."""
    bits = {layer.name: width for unit, width in zip(units, found.genome, strict=True) for layer in unit.layers}
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
        budget_reached=mean_bits_fraction(units, found.genome),
        transforms=recipe.transforms,
        weights=options.weights,
        text=text,
        search={
            "algorithm": "genetic",
            "fitness": options.fitness,
            "population": options.ga_pop,
            "generations": len(found.history),
            "ctx": options.ctx,
            "alpha": options.alpha,
            "channel_scales": prepared.scales,
            "scores": dict(found.scores),
            **found.about,
        },
        seed=options.seed,
        versions=made_with(source),
        codes_sha256=sha256(codes),
    )
    return plan, outcomes


def write_results(
    output: Path, plan: Plan, outcomes: Sequence[Outcome], prepared: Prepared, found: Found,
    front: Sequence[FrontPoint], stages: Stages,
) -> list[Path]:  # fmt: skip
    """Write the reports, then the codes, then the plan, so that a plan that exists is complete."""
    rows = [
        {**asdict(row), "ratio": row.ratio, "a_bits": plan.layers[row.layer].a_bits}
        for row in prepared.sensitivity.values()
    ]
    made_by = {"plan": plan.hash, "model": plan.model_id, "text": dict(plan.text), "seed": plan.seed, **plan.versions}
    kinds = (*REPORTS, *FRONT_REPORTS) if front else REPORTS
    named = dict(zip(kinds, report_paths(output, front=bool(front)), strict=True))
    history = {"made_by": made_by, "scores": found.scores, **found.about, "generations": found.history}
    write_text(named["sensitivity.json"], json.dumps({"made_by": made_by, "layers": rows}, indent=1))
    write_text(named["sensitivity.csv"], csv_text(list(rows[0]), [list(row.values()) for row in rows]))
    write_text(
        named["outcome.csv"], csv_text(list(asdict(outcomes[0])), [list(asdict(row).values()) for row in outcomes])
    )
    write_text(named["history.json"], json.dumps(history, indent=1))
    _draw(named["sensitivity.png"], named["convergence.png"], plan, rows, found)
    if front:
        points = [asdict(point) for point in front]
        numbers = [{key: value for key, value in point.items() if key != "bits"} for point in points]
        write_text(named["front.json"], json.dumps({"made_by": made_by, "points": points}, indent=1))
        write_text(named["front.csv"], csv_text(list(numbers[0]), [list(row.values()) for row in numbers]))
        front_plot(
            named["front.png"], numbers, title=f"{short_name(plan.model_id)}: KL against activation bits",
            chosen=8 * plan.budget_reached,
        )  # fmt: skip
    codes = codes_path(output)
    stages.codes.replace(codes)
    try:
        save_plan(output, plan)
    except HalfbyteError:
        codes.replace(stages.codes)  # a resumed run starts from here
        raise
    return [output, codes, *named.values()]


def _draw(heatmap: Path, convergence: Path, plan: Plan, rows: list[dict[str, Any]], found: Found) -> None:
    kinds = list(dict.fromkeys(row["layer"].rpartition(".")[2] for row in rows))
    ratios = [[row["ratio"] for row in rows[at : at + len(kinds)]] for at in range(0, len(rows), len(kinds))]
    bits = [[row["a_bits"] for row in rows[at : at + len(kinds)]] for at in range(0, len(rows), len(kinds))]
    name = short_name(plan.model_id)
    sensitivity_heatmap(
        heatmap, kinds, list(range(len(ratios))), ratios, title=f"{name}: what 4-bit activations cost", chosen_bits=bits
    )
    baselines = {label: score for label, score in found.scores.items() if label != "plan"}
    convergence_plot(
        convergence,
        found.history,
        baselines=baselines,
        title=f"{name}: genetic search, budget {plan.budget_asked:g}",
        score_label=score_label(plan.search["fitness"]),
    )
