"""The reports that a search leaves beside its plan: JSON, CSV and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from halfbyte.core.files import short_name, write_text
from halfbyte.core.language import say
from halfbyte.models.layers import Outcome, Unit, mean_bits_fraction
from halfbyte.plan import Plan
from halfbyte.report.plots import (
    DOTS_PER_INCH,
    GRID_COLOUR,
    LINE_COLOURS,
    SEARCH_COLOUR,
    convergence_plot,
    save_figure,
    sensitivity_heatmap,
    set_title,
)
from halfbyte.report.tables import csv_text, format_bytes, significant
from halfbyte.search.run import Found
from halfbyte.search.sensitivity import LayerSensitivity

ACTIVATION_REPORTS = (
    "sensitivity.json",
    "sensitivity.csv",
    "sensitivity.png",
    "outcome.csv",
    "history.json",
    "convergence.png",
)
FRONT_REPORTS = ("front.json", "front.csv", "front.png")
TYPE_REPORTS = ("types.csv", "types.json")
TYPE_FRONT_REPORTS = ("types-front.json", "types-front.csv", "types-front.png")


def beside(output: Path, kind: str) -> Path:
    """Where the report ``kind`` of the plan at ``output`` goes."""
    return output.with_name(f"{output.stem}.{kind}")


def write_activation_reports(
    output: Path,
    plan: Plan,
    outcomes: Sequence[Outcome],
    sensitivity: Mapping[str, LayerSensitivity],
    units: Sequence[Unit],
    found: Found,
    widths: tuple[int, int],
    losses: Sequence[Sequence[float]],
) -> Iterator[Path]:
    """Layer sensitivity, outcomes, history, and the front of budgets if there is one; each path when it is written.

    Args:
        losses: ``[unit][width]`` that a unit alone makes the whole model lose.
    """
    rows = [
        {**asdict(row), "ratio": row.ratio, "a_bits": plan.layers[row.layer].a_bits} for row in sensitivity.values()
    ]
    alone = [
        {"unit": unit.name, "a_bits": found.choice[unit.name], "loss": menu[0] - menu[-1]}
        for unit, menu in zip(units, losses, strict=True)
    ]
    about = {"made_by": _made_by(plan), "a_bits": widths, "score_label": found.score_label}
    sensitivities = json.dumps({**about, "layers": rows, "units": alone}, indent=1)
    yield write_text(beside(output, "sensitivity.json"), sensitivities)
    yield write_text(beside(output, "sensitivity.csv"), _table(rows))
    yield write_text(beside(output, "outcome.csv"), _table([asdict(row) for row in outcomes]))
    history = _history(plan, found)
    yield write_text(beside(output, "history.json"), json.dumps(history, indent=1))
    yield draw_sensitivity(beside(output, "sensitivity.png"), plan, rows, widths)
    yield draw_convergence(beside(output, "convergence.png"), plan, history)
    if found.front:
        points = [
            {
                "budget": float(name),
                "mean_bits": 8 * mean_bits_fraction(units, [int(point.choice[unit.name]) for unit in units]),
                "kl_search": point.search_scores["plan"],
                **_validated(point),
            }
            for name, point in found.front.items()
        ]
        yield write_text(
            beside(output, "front.json"), json.dumps({"made_by": _made_by(plan), "points": points}, indent=1)
        )
        yield write_text(beside(output, "front.csv"), _table(points))
        yield draw_bits_front(beside(output, "front.png"), plan, points)


def write_type_reports(output: Path, plan: Plan, rows: Sequence[Mapping[str, Any]], found: Found) -> Iterator[Path]:
    """Matrix, type, bytes, what it loses alone; the history; and a front of sizes; each when it is written."""
    table, history = (beside(output, kind) for kind in TYPE_REPORTS)
    yield write_text(table, _table(rows))
    yield write_text(history, json.dumps(_history(plan, found), indent=1))
    if not found.front:
        return
    tried = any(point.refinement for point in found.front.values())

    def refined(point: Found) -> dict[str, float]:
        return {"kl_refined": _refined(point)} if tried else {}

    points = [
        {"ftype": ftype, "bytes": point.cost, **_validated(point), **refined(point)}
        for ftype, point in sorted(found.front.items(), key=lambda item: item[1].cost)
    ]
    numbers, table, picture = (beside(output, kind) for kind in TYPE_FRONT_REPORTS)
    yield write_text(numbers, json.dumps({"made_by": _made_by(plan), "points": points}, indent=1))
    yield write_text(table, _table(points))
    yield draw_sizes_front(picture, plan, points, found.cost)


def _made_by(plan: Plan) -> dict[str, Any]:
    return {"plan": plan.hash, "model": plan.model_id, "text": dict(plan.text), "seed": plan.seed, **plan.versions}


def _history(plan: Plan, found: Found) -> dict[str, Any]:
    return {
        "made_by": _made_by(plan),
        "score_label": found.score_label,
        **found.record(),
        "generations": [asdict(generation) for generation in found.history],
    }


def _validated(found: Found) -> dict[str, float]:
    return {
        "kl_validation": found.validation_scores["plan"],
        "kl_knapsack": found.validation_scores["KL knapsack"],
        "noise_floor": found.noise_floor,
    }


def _refined(found: Found) -> float:
    """KL on the validation text with the weights that the plan has."""
    return found.refinement.after if found.refinement and found.refined else found.validation_scores["plan"]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return csv_text(list(rows[0]), [list(row.values()) for row in rows])


def draw_sensitivity(path: Path, plan: Plan, rows: Sequence[Mapping[str, Any]], widths: tuple[int, int]) -> Path:
    """What the fewest activation bits cost each layer; ``rows`` are those of ``sensitivity.json``."""
    kinds = list(dict.fromkeys(row["layer"].rpartition(".")[2] for row in rows))
    blocks = [rows[at : at + len(kinds)] for at in range(0, len(rows), len(kinds))]
    ratios = [[row["ratio"] for row in block] for block in blocks]
    bits = [[row["a_bits"] for row in block] for block in blocks]
    title = f"{short_name(plan.model_id)}: {_dearest(rows, widths)}"
    sensitivity_heatmap(path, kinds, list(range(len(ratios))), ratios, title=title, chosen_bits=bits, widths=widths)
    return path


def draw_convergence(path: Path, plan: Plan, history: Mapping[str, Any]) -> Path:
    """How the score fell; ``history`` is ``history.json`` or ``types.json``."""
    baselines = {label: score for label, score in history["scores"].items() if label != "plan"}
    convergence_plot(
        path,
        history["generations"],
        baselines=baselines,
        title=f"{short_name(plan.model_id)}: {_gained(history['generations'][-1]['best'], baselines)}",
        score_label=history["score_label"],
        noise=history["noise_floor"],
    )
    return path


def _dearest(rows: Sequence[Mapping[str, Any]], widths: tuple[int, int]) -> str:
    """Which kind of layer the fewest bits cost most."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        if row["ratio"] is not None and math.isfinite(row["ratio"]):
            kinds.setdefault(row["layer"].rpartition(".")[2], []).append(row["ratio"])
    if not kinds:
        return say("what {bits}-bit activations cost", bits=widths[0])
    kind, ratio = max(((kind, median(ratios)) for kind, ratios in kinds.items()), key=lambda item: item[1])
    return say(
        "{low}-bit activations cost {kind} most, {ratio} times the error of {high} bits",
        low=widths[0],
        high=widths[1],
        kind=kind,
        ratio=significant(ratio, 2),
    )


def _gained(best: float, baselines: Mapping[str, float]) -> str:
    """What the search gained over the best that it started from; the ends of the menu keep to no budget."""
    starts = {label: score for label, score in baselines.items() if not label.startswith("all ")}
    if not starts:
        return say("genetic search")
    label = min(starts, key=lambda name: starts[name])
    if best >= starts[label]:
        return say("the genetic search found nothing better than {label} on the search text", label=label)
    if starts[label] <= 0:
        return say(
            "the genetic search, from {first} ({label}) to {best}",
            first=significant(starts[label]),
            label=label,
            best=significant(best),
        )
    share = f"{100 * (1 - best / starts[label]):.1f}%"
    return say("the genetic search is {share} below {label} on the search text", share=share, label=label)


def draw_bits_front(path: Path, plan: Plan, points: Sequence[Mapping[str, Any]]) -> Path:
    """KL against activation bits; ``points`` are those of ``front.json``."""
    bits = [point["mean_bits"] for point in points]
    axis = say("mean activation bits, weighted by multiply-accumulates")
    title = (
        f"{short_name(plan.model_id)}: {_over_front(points, [say('{bits} bits', bits=f'{one:.2f}') for one in bits])}"
    )
    return _draw_front(path, bits, points, axis, title, chosen=8 * plan.budget_reached)


def draw_sizes_front(path: Path, plan: Plan, points: Sequence[Mapping[str, Any]], nbytes: int) -> Path:
    """KL against size; ``points`` are those of ``types-front.json``, ``nbytes`` is what the plan has."""
    sizes = [point["bytes"] / 1e6 for point in points]
    names = [format_bytes(point["bytes"]) for point in points]
    title = f"{short_name(plan.model_id)}: {_over_front(points, names)}"
    return _draw_front(path, sizes, points, say("size of the matrices, MB"), title, chosen=nbytes / 1e6)


def _over_front(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """How KL falls from the smallest budget to the largest, whose names these are."""
    scores = [point.get("kl_refined", point["kl_validation"]) for point in points]
    return say(
        "KL {first} at {smallest}, {last} at {largest}",
        first=significant(scores[0], 2),
        smallest=names[0],
        last=significant(scores[-1], 2),
        largest=names[-1],
    )


def _draw_front(
    path: Path, places: Sequence[float], points: Sequence[Mapping[str, Any]], axis: str, title: str, *, chosen: float
) -> Path:
    """The validated KL of each budget's best choice, before and after refining, and of its knapsack, at ``places``.

    The plan is at ``chosen``.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        places,
        [point["kl_knapsack"] for point in points],
        color=LINE_COLOURS[0],
        linestyle="--",
        marker="x",
        label=say("knapsack over one-at-a-time KL"),
    )
    axes.errorbar(
        places,
        [point["kl_validation"] for point in points],
        yerr=[point["noise_floor"] for point in points],
        color=SEARCH_COLOUR,
        marker="o",
        capsize=3,
        label=say("search; bars: noise floor"),
    )
    refined = [point["kl_refined"] for point in points if "kl_refined" in point]  # of all or of none
    if refined:
        axes.plot(places, refined, color=LINE_COLOURS[1], marker="s", label=say("search, refined"))
    axes.axvline(chosen, color="#555555", linestyle=":", label=say("the plan"))
    axes.set_xlabel(axis)
    axes.set_ylabel(say("KL on the validation text, nats per token"))
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID_COLOUR)
    axes.legend(frameon=False, fontsize=8)
    set_title(figure, title)
    save_figure(figure, path)
    return path
