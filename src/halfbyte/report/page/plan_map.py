"""The map of a plan: blocks × kinds of layers, each cell in the colour of its format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.colors import to_hex

from halfbyte.core.language import say
from halfbyte.plan import Plan
from halfbyte.quant.ggml.types import bits_per_weight
from halfbyte.report.plots import needs_white
from halfbyte.report.summary import LLAMACPP_ROUNDS

COLOUR_MAP = "cividis"  # of few to many bits; made for people who see red and green alike
IN_A_BLOCK = re.compile(r".*\.(\d+)\..*?([^.]+)")  # its number, and the last part of the name


@dataclass(frozen=True)
class MapCell:
    """The format of one layer, with its colours."""

    name: str
    text: str
    colour: str
    ink: str


@dataclass(frozen=True)
class PlanMap:
    """Blocks × kinds of layers, and how many layers have which format.

    Attributes:
        title: what is shown.
        note: what the reader has to know.
        kinds: the columns.
        blocks: block -> a cell for each kind, None where the block has no such layer.
        others: matrices that are in no block.
        counts: a cell of each format, and how many there are.
    """

    title: str
    note: str
    kinds: list[str]
    blocks: dict[str, list[MapCell | None]]
    others: list[MapCell]
    counts: list[tuple[MapCell, int]]


def maps_of(plan: Plan) -> list[PlanMap]:
    """The maps that a plan has: of activation bits, of ggml types, or of both."""
    maps = []
    if plan.layers:
        formats = {name: f"A{entry.a_bits}" for name, entry in plan.layers.items()}
        note = say(LLAMACPP_ROUNDS) if plan.target == "gguf" else ""
        maps.append(_map(say("Bits of activations"), note, formats, lambda kind: float(kind[1:])))
    if plan.tensors:
        maps.append(_map(say("ggml types of weights"), "", plan.tensors, bits_per_weight))
    return maps


def _map(title: str, note: str, formats: Mapping[str, str], rank: Callable[[str], float]) -> PlanMap:
    order = sorted(set(formats.values()), key=lambda kind: (rank(kind), kind))
    shades = {kind: 0.12 + 0.8 * at / max(len(order) - 1, 1) for at, kind in enumerate(order)}
    blocks: dict[str, dict[str, MapCell]] = {}
    kinds: dict[str, None] = {}
    others = []
    for name, kind in formats.items():
        cell, place = cell_of(name, kind, shades[kind]), IN_A_BLOCK.fullmatch(name)
        if place is None:
            others.append(cell)
            continue
        block, short = place[1], place[2].removesuffix("_proj")
        kinds[short] = None
        blocks.setdefault(block, {})[short] = cell
    rows = {block: [cells.get(kind) for kind in kinds] for block, cells in blocks.items()}
    found = Counter(formats.values())
    counts = [(cell_of("", kind, shades[kind]), found[kind]) for kind in order]
    return PlanMap(title, note, [*kinds], rows, others, counts)


def cell_of(name: str, text: str, shade: float) -> MapCell:
    """A cell whose letters can be read; ``shade`` is from 0 to 1."""
    colour = colormaps[COLOUR_MAP](shade)
    return MapCell(name, text, to_hex(colour), "#ffffff" if needs_white(colour) else "#000000")
