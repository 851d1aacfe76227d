"""What a search leaves behind: the plan, its codes, and its reports as JSON, CSV and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.core.device import made_with
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import sha256, write_text
from halfbyte.core.naming import short_name
from halfbyte.models.layers import Outcome, Unit, mean_bits_fraction
from halfbyte.models.loading import SourceModel
from halfbyte.options import SearchOptions
from halfbyte.plan import Plan, codes_path, save_plan, types_path
from halfbyte.prepare.walk import Prepared
from halfbyte.report.front import front_plot, size_front_plot
from halfbyte.report.plots import convergence_plot, sensitivity_heatmap
from halfbyte.report.tables import csv_text
from halfbyte.search.problem import Genome
from halfbyte.workdir import Stages

REPORTS = (
    "sensitivity.json",
    "sensitivity.csv",
    "sensitivity.png",
    "outcome.csv",
    "history.json",
    "convergence.png",
)
FRONT_REPORTS = ("front.json", "front.csv", "front.png")
FRONT_TYPES = ("Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")  # of llama.cpp, whose sizes make a front
ALL_A8: dict[str, Any] = {"budget_asked": 1.0, "budget_reached": 1.0}  # what llama.cpp computes with
TYPE_REPORTS = ("types.csv", "types.json")
TYPE_FRONT_REPORTS = ("types-front.csv", "types-front.png")


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
class TypesFound:
    """What the search of ggml types leaves for one size.

    Attributes:
        transforms: folded into the weights.
        types: matrix -> ggml type.
        capacity, nbytes: bytes that the matrices might take, and that they take.
        losses: name -> KL on the validation text, nats per token: of the winner (``plan``) and what it had to beat.
        history: one row per generation.
        about: how it was found.
        rows: one per matrix: its type, bytes, and predicted loss.
        front: file type of llama.cpp -> the best mixture of its size, if asked for.
    """

    transforms: tuple[str, ...]
    types: dict[str, str]
    capacity: int
    nbytes: int
    losses: dict[str, float]
    history: list[dict[str, float]]
    about: dict[str, Any]
    rows: list[dict[str, Any]]
    front: Mapping[str, TypesFound] = field(default_factory=dict)


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


@dataclass(frozen=True)
class ActivationsFound:
    """What the search of activation bits leaves.

    Attributes:
        transforms: folded, or done at run time.
        units: one gene each.
        prepared: the W4 codes and what was measured of them.
        found: the winner.
        front: the best of each budget, if asked for.
        preparation_memory: most bytes allocated on the device until the W4 codes stood.
    """

    transforms: tuple[str, ...]
    units: Sequence[Unit]
    prepared: Prepared
    found: Found
    front: Sequence[FrontPoint]
    preparation_memory: int


def output_paths(output: Path, spaces: Sequence[str], *, front: bool) -> list[Path]:
    """What a search of ``spaces`` writes beside the plan at ``output``."""
    paths = []
    if "a4a8" in spaces:
        kinds = (*REPORTS, *(FRONT_REPORTS if front else ()))
        paths += [codes_path(output), *(_beside(output, kind) for kind in kinds)]
    if "ggml" in spaces:
        paths += [types_path(output), *(_beside(output, kind) for kind in TYPE_REPORTS)]
    if "ggml" in spaces and front:
        plans = [_point_path(output, like) for like in FRONT_TYPES]
        paths += [*plans, *map(types_path, plans), *(_beside(output, kind) for kind in TYPE_FRONT_REPORTS)]
    return paths


def _point_path(output: Path, like: str) -> Path:
    """Where the plan of one point of a front of types goes."""
    return output.with_name(f"{output.stem}.{like}{output.suffix}")


def _beside(output: Path, kind: str) -> Path:
    return output.with_name(f"{output.stem}.{kind}")


def weights_of(options: SearchOptions) -> str:
    """The weight quantiser, or the checkpoint whose codes were taken over: ``from NAME``."""
    if options.weights_from is None:
        return options.weights
    return f"from {Path(options.weights_from).expanduser().resolve().name}"


def make_plan(
    options: SearchOptions,
    source: SourceModel,
    activations: ActivationsFound | None,
    types: TypesFound | None,
    text: Mapping[str, Any],
    stages: Stages,
) -> tuple[Plan, list[Outcome]]:
    """The plan of the winners, and per layer and matrix what was asked and what was done."""
    plan = Plan(
        model_id=options.model_id,
        fingerprint=source.fingerprint,
        target=options.target,
        granularity=options.granularity,
        layers={},
        weights=weights_of(options),
        text=text,
        seed=options.seed,
        versions=made_with(source),
        **ALL_A8,
    )
    outcomes: list[Outcome] = []
    if activations is not None:
        plan = _with_activations(plan, options, activations, outcomes, stages)
    if types is not None:
        outcomes += [Outcome(name, "a ggml type", kind) for name, kind in types.types.items()]
        plan = _with_types(plan, types, stages.types())
    return plan, outcomes


def _with_types(plan: Plan, found: TypesFound, encoded: Path) -> Plan:
    record = {
        "transforms": list(found.transforms),
        "capacity": found.capacity,
        "nbytes": found.nbytes,
        "losses": found.losses,
        **found.about,
        "sha256": sha256(encoded),
    }
    return replace(plan, tensors=found.types, file=record)


def _with_activations(
    plan: Plan, options: SearchOptions, made: ActivationsFound, outcomes: list[Outcome], stages: Stages
) -> Plan:
    units, found = made.units, made.found
    bits = {layer.name: width for unit, width in zip(units, found.genome, strict=True) for layer in unit.layers}
    entries = {}
    for name, prepared in made.prepared.layers.items():
        entries[name] = replace(prepared, a_bits=bits[name])
        asked, done = f"W4 g{options.group_size}", f"W{prepared.w_bits} g{prepared.group_size} A{bits[name]}"
        outcomes.append(Outcome(name, asked, done, prepared.note))
    return replace(
        plan,
        layers=entries,
        budget_asked=options.target_compression,
        budget_reached=mean_bits_fraction(units, found.genome),
        transforms=made.transforms,
        search={
            "algorithm": "genetic",
            "fitness": options.fitness,
            "population": options.ga_pop,
            "generations": len(found.history),
            "ctx": options.ctx,
            "alpha": options.alpha,
            "channel_scales": made.prepared.scales,
            "scores": dict(found.scores),
            **found.about,
        },
        codes_sha256=sha256(stages.codes),
    )


def write_results(
    output: Path,
    plan: Plan,
    outcomes: Sequence[Outcome],
    activations: ActivationsFound | None,
    types: TypesFound | None,
    stages: Stages,
) -> list[Path]:
    """Write the reports, then codes and encoded matrices, then the plan, so that a plan that exists is complete."""
    made_by = {"plan": plan.hash, "model": plan.model_id, "text": dict(plan.text), "seed": plan.seed, **plan.versions}
    named: list[Path] = []
    moved: list[tuple[Path, Path]] = []
    if activations is not None:
        named += _activation_reports(output, plan, outcomes, activations, made_by)
        moved.append((stages.codes, codes_path(output)))
    plans = {output: plan}
    if types is not None:
        named += _type_reports(output, plan, types, made_by)
        moved.append((stages.types(), types_path(output)))
        for like, point in types.front.items():
            path = _point_path(output, like)
            bare = replace(plan, layers={}, codes_sha256="", search={}, transforms=(), **ALL_A8)
            plans[path] = _with_types(bare, point, stages.types(like))
            moved.append((stages.types(like), types_path(path)))
    for here, there in moved:
        here.replace(there)
    try:
        for path, one in plans.items():
            save_plan(path, one)
    except HalfbyteError:
        for here, there in moved:
            there.replace(here)  # a resumed run starts from here
        raise
    return [*plans, *(there for _, there in moved), *named]


def _activation_reports(
    output: Path, plan: Plan, outcomes: Sequence[Outcome], made: ActivationsFound, made_by: dict[str, Any]
) -> list[Path]:
    prepared, found, front = made.prepared, made.found, made.front
    rows = [
        {**asdict(row), "ratio": row.ratio, "a_bits": plan.layers[row.layer].a_bits}
        for row in prepared.sensitivity.values()
    ]
    kinds = (*REPORTS, *FRONT_REPORTS) if front else REPORTS
    named = {kind: _beside(output, kind) for kind in kinds}
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
            named["front.png"],
            numbers,
            title=f"{short_name(plan.model_id)}: KL against activation bits",
            chosen=8 * plan.budget_reached,
        )
    return list(named.values())


def _type_reports(output: Path, plan: Plan, found: TypesFound, made_by: dict[str, Any]) -> list[Path]:
    """Matrix, type, bytes, what it loses alone; the history; and a front of sizes."""
    table, history = (_beside(output, kind) for kind in TYPE_REPORTS)
    write_text(table, csv_text(list(found.rows[0]), [list(row.values()) for row in found.rows]))
    record = {"made_by": made_by, "losses": found.losses, **found.about, "generations": found.history}
    write_text(history, json.dumps(record, indent=1))
    if not found.front:
        return [table, history]
    points = [
        {
            "like": like,
            "bytes": point.nbytes,
            "kl_validation": point.losses["plan"],
            "kl_knapsack": point.losses["knapsack"],
            "noise_floor": point.about["noise_floor"],
        }
        for like, point in sorted(found.front.items(), key=lambda item: item[1].nbytes)
    ]
    numbers, picture = (_beside(output, kind) for kind in TYPE_FRONT_REPORTS)
    write_text(numbers, csv_text(list(points[0]), [list(point.values()) for point in points]))
    size_front_plot(picture, points, title=f"{short_name(plan.model_id)}: KL against size", chosen=found.nbytes)
    return [table, history, numbers, picture]


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
