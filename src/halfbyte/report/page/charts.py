"""The pictures of a page: drawn from the numbers beside the plan by the functions that draw the PNGs, as inline SVG."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from halfbyte.core.files import scratch_folder
from halfbyte.core.language import say
from halfbyte.core.schema import read_json
from halfbyte.plan import Plan
from halfbyte.report.plots import GRID_COLOUR, LINE_COLOURS, SEARCH_COLOUR
from halfbyte.report.search_reports import (
    beside,
    draw_bits_front,
    draw_convergence,
    draw_sensitivity,
    draw_sizes_front,
)

DARK = {  # what the colours of pictures become on a dark page
    SEARCH_COLOUR: "#56b4e9",
    **dict(zip(LINE_COLOURS, ("#ff9c4a", "#3fd0a0", "#e79fcb", "#e0c068", "#b79be6", "#b5b5b5"), strict=True)),
    GRID_COLOUR: "#4a4a4a",
}
SENSITIVITY = "Mean squared error of each layer's output with the fewest activation bits, relative to the most."
CONVERGENCE = (
    "Each point is a generation of the genetic algorithm; lines are what it started from, and the ends of the menu."
)
FRONT = "KL on the validation text; bars are the noise floor."


@dataclass(frozen=True)
class Chart:
    """A picture and what it says."""

    title: str
    text: str
    svg: Markup


def charts_of(path: Path, plan: Plan, prefix: str) -> tuple[list[Chart], list[str]]:
    """The pictures of the plan at ``path``, and what is not shown, with the reason.

    Args:
        prefix: of all identifiers.
    """
    charts: list[Chart] = []
    missing: list[str] = []
    with scratch_folder() as folder:

        def chart(kind: str, title: str, text: str, draw: Callable[[Path, dict[str, Any]], object]) -> None:
            numbers, picture = beside(path, kind), folder / f"{kind}.svg"
            if not numbers.is_file():
                missing.append(f"{numbers.name} ({say('not beside the plan')})")
                return
            try:
                found = read_json(numbers, "report")
                if found["made_by"]["plan"] != plan.hash:
                    missing.append(f"{numbers.name} ({say('of another plan')})")
                    return
                draw(picture, found)
            except Exception as error:  # noqa: BLE001 - numbers that somebody changed
                missing.append(f"{numbers.name} ({say('cannot be drawn')}: {type(error).__name__}: {error})")
                return
            charts.append(Chart(title, text, _inline(picture.read_text(encoding="utf-8"), f"{prefix}-{len(charts)}")))

        if plan.layers:
            chart(
                "sensitivity.json",
                say("Where few activation bits hurt"),
                say(SENSITIVITY),
                lambda picture, found: draw_sensitivity(picture, plan, found["layers"], tuple(found["a_bits"])),
            )
            chart(
                "history.json",
                say("How the search of activation bits went"),
                say(CONVERGENCE),
                lambda picture, found: draw_convergence(picture, plan, found),
            )
        if plan.tensors:
            chart(
                "types.json",
                say("How the search of ggml types went"),
                say(CONVERGENCE),
                lambda picture, found: draw_convergence(picture, plan, found),
            )
        if plan.layers and beside(path, "front.json").is_file():
            chart(
                "front.json",
                say("What other budgets would give"),
                say(FRONT),
                lambda picture, found: draw_bits_front(picture, plan, found["points"]),
            )
        if plan.tensors and beside(path, "types-front.json").is_file():
            chart(
                "types-front.json",
                say("What other sizes would give"),
                say(FRONT),
                lambda picture, found: draw_sizes_front(picture, plan, found["points"], plan.file["nbytes"]),
            )
    return charts, missing


def _inline(svg: str, prefix: str) -> Markup:
    """An SVG file as part of a page: its colours follow the theme, its identifiers are its own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace("#000000", "currentColor")
    for colour in DARK:
        svg = svg.replace(colour, f"var(--{colour[1:]})")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return Markup(re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg))
