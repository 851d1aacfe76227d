"""One HTML page that says what a search decided, why it can be trusted, and what it costs.

It is made from the plan and the reports beside it, holds everything that it shows, and needs neither network nor
scripts. What was compared is kept in the page itself, so that it can be made anew.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from pydantic import Field

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import scratch_folder, short_name, write_text
from halfbyte.core.guard import Touched, guarded
from halfbyte.core.schema import parsed, read_json
from halfbyte.options import ReportOptions
from halfbyte.plan import Plan, check_suffix, load_plan, plan_files
from halfbyte.quant.ggml.types import bits_per_weight
from halfbyte.report.plots import GRID_COLOUR, LINE_COLOURS, SEARCH_COLOUR
from halfbyte.report.search_reports import (
    beside,
    draw_bits_front,
    draw_convergence,
    draw_sensitivity,
    draw_sizes_front,
)
from halfbyte.report.tables import Cell, format_bytes, format_cell, format_ratio, format_seconds, significant

PAGE = "report.html"
ALIKE = 0.02  # difference of two sizes, relative to one, up to which they count as the same
KEPT = re.compile(r'<script type="application/json" id="comparisons">(.*?)</script>', re.DOTALL)
COLOUR_MAP = "cividis"  # of few to many bits; made for people who see red and green alike
COMPARED = ("model", "size", "KL", "top-1", "ppl", "tokens/s", "speed-up", "prompt/s", "memory", "load", "engine")
DARK = {  # what the colours of pictures become on a dark page
    SEARCH_COLOUR: "#56b4e9",
    **dict(zip(LINE_COLOURS, ("#ff9c4a", "#3fd0a0", "#e79fcb", "#e0c068", "#b79be6", "#b5b5b5"), strict=True)),
    GRID_COLOUR: "#4a4a4a",
}
HEADLINE = (("measured", "bytes"), ("quality", "kld_mean"), ("measured", "generation_tokens_per_second"))
MOST_COMPARISONS = 3  # that a page keeps
LOUDEST = 12  # units and matrices that are named because they lose most


@dataclass(frozen=True)
class MeasuredRow:
    """One model of a comparison, as far as the page shows it; keys that it does not know are left alone."""

    name: str
    engine: str = ""
    measured: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    speed_up: Annotated[float, Field(ge=0)] | None = None
    missing: str = ""
    note: str = ""

    def number(self, of: str, key: str) -> float | None:
        """A number that was measured, or None."""
        value = (getattr(self, of) or {}).get(key)
        return value if isinstance(value, (int, float)) else None

    @property
    def sample(self) -> str:
        """The text that it wrote."""
        return str((self.measured or {}).get("sample") or "").strip()


@dataclass(frozen=True)
class Comparison:
    """What ``halfbyte compare --json`` writes."""

    rows: list[MeasuredRow]
    model: str
    text: str
    machine: str
    plan: str | None = None
    prompt: str = ""


@dataclass(frozen=True)
class MapCell:
    """The format of one layer on the map, with its colours."""

    name: str
    text: str
    colour: str
    ink: str


@dataclass(frozen=True)
class PlanMap:
    """Blocks × kinds of layers, and how many layers have which format.

    Attributes:
        title: what is shown.
        kinds: the columns.
        blocks: block -> a cell for each kind, None where the block has no such layer.
        others: matrices that are in no block.
        counts: a cell of each format, and how many there are.
    """

    title: str
    kinds: list[str]
    blocks: dict[str, list[MapCell | None]]
    others: list[MapCell]
    counts: list[tuple[MapCell, int]]


@dataclass(frozen=True)
class Chart:
    """A picture and what it says."""

    title: str
    text: str
    svg: Markup


def make_report(options: ReportOptions) -> Path:
    """Write the page of one or several plans, and of comparisons, anew.

    Raises:
        HalfbyteError: a plan or comparison is missing, damaged, or of another model; the output exists.
    """
    configs = [Path(one.strip()) for one in options.config.split(",") if one.strip()]
    comparisons = [one.strip() for one in (options.comparison or "").split(",") if one.strip()]
    if not configs:
        raise HalfbyteError("--config: expected the name of a plan, got none")
    for config in configs:
        check_suffix(config)
    output = Path(options.output) if options.output else beside(configs[0], PAGE)
    records = [read_json(one, "comparison") for one in comparisons]
    files = [str(file) for config in configs for file in plan_files(config)]
    touched = Touched(inputs=[*files, *comparisons], outputs=[output])
    with guarded(touched, json=options.json, force=options.force):
        write_page(output, configs, records)
    return output


def write_page(output: Path, configs: Sequence[Path], comparisons: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the page of the plans at ``configs``.

    Args:
        comparisons: as ``halfbyte compare --json`` writes them.

    Raises:
        HalfbyteError: a plan cannot be read, or a comparison is of another model.
    """
    plans = [load_plan(path, with_codes=False) for path in configs]
    found = [parsed(Comparison, dict(record), where="comparison") for record in comparisons]
    names = {short_name(plan.model_id) for plan in plans}
    for one in found:
        if short_name(one.model) not in names:
            raise HalfbyteError(f"comparison: of another model, expected {', '.join(names)}, got {one.model}")
    environment = Environment(
        loader=PackageLoader("halfbyte.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html.jinja").render(
        dark={colour[1:]: other for colour, other in DARK.items()},
        title=", ".join(sorted(names)),
        sections=[_section(path, plan) for path, plan in zip(configs, plans, strict=True)],
        sentence=_sentence(plans[0], found[-1] if found else None),
        comparisons=[_comparison_section(one) for one in found],
        kept=Markup(json.dumps(list(comparisons)).replace("<", "\\u003c")),
    )
    return write_text(output, text)


def add_comparison(config: str | Path, record: Mapping[str, Any]) -> Path | None:
    """Put a comparison into the page beside the plan at ``config``.

    Returns:
        The page; None if there is none, it cannot be written, or the comparison is of another model.
    """
    page = beside(Path(config), PAGE)
    try:
        kept = KEPT.search(page.read_text(encoding="utf-8"))
        if kept is None:
            return None  # no page of ours
        earlier = [one for one in json.loads(kept[1]) if one != record]
        return write_page(page, [Path(config)], [*earlier[1 - MOST_COMPARISONS :], record])
    except Exception:  # noqa: BLE001 - what was measured must not be lost for a page
        return None


def _sentence(plan: Plan, comparison: Comparison | None) -> str:
    """The result in one sentence."""
    rows = {row.name: row for row in comparison.rows if row.measured} if comparison else {}
    ours, theirs = rows.get("mixed"), rows.get("Q4_K_M")
    numbers = [row.number(of, key) for row in (ours, theirs) if row for of, key in HEADLINE]
    own = comparison is not None and comparison.plan in (None, plan.hash) and not (ours and ours.note)
    if comparison and ours and theirs and own and None not in numbers:
        size, other = (row.number("measured", "bytes") or 0 for row in (ours, theirs))
        same = (
            f"the size of {theirs.name}" if abs(size - other) <= ALIKE * other else f"{format_bytes(other)} for Q4_K_M"
        )
        kl, speed = (
            [significant(row.number(of, key)) for row in (ours, theirs)]
            for of, key in (("quality", "kld_mean"), ("measured", "generation_tokens_per_second"))
        )
        return (
            f"At {format_bytes(size)}, {same}, KL to the original is {kl[0]} against {kl[1]}; generation "
            f"{speed[0]} tokens/s against {speed[1]} on {comparison.machine}."
        )
    if plan.tensors:
        return f"{_file(plan)}: {_scores(plan.file)}."
    return f"{_bits(plan)}: {_scores(plan.search)}."


def _bits(plan: Plan) -> str:
    counts = Counter(entry.a_bits for entry in plan.layers.values())
    parts = " and ".join(f"{count} layers with {bits}-bit" for bits, count in sorted(counts.items()))
    return f"{parts} activations, {8 * plan.budget_reached:.2f} bits on average"


def _file(plan: Plan) -> str:
    nbytes = plan.file.get("nbytes", 0)
    kinds = len(set(plan.tensors.values()))
    return f"{format_bytes(nbytes)} for {len(plan.tensors)} matrices of {kinds} ggml types"


def _scores(record: Mapping[str, Any]) -> str:
    """The plan's score and those of the ends of the menu, on text that nothing was chosen on if there is such."""
    if record.get("fitness", "kl") != "kl":
        return "nothing was measured on the whole model, the search minimised a sum of layer errors"
    scores = record.get("validation") or record.get("scores") or {}
    where = "validation text" if record.get("validation") else "the text of the search"
    plan = {label: score for label, score in scores.items() if label.startswith("plan")}
    if not plan:
        return "no score was measured on the whole model"
    others = {label: score for label, score in scores.items() if label not in plan}
    text = f"KL to the original on {where} {significant(min(plan.values()))}"
    return text + "".join(f", {label} {significant(score)}" for label, score in others.items() if label[:3] == "all")


def _section(path: Path, plan: Plan) -> dict[str, Any]:
    """What the template says of one plan."""
    missing: list[str] = []
    charts = [chart for chart in _charts(path, plan, missing) if chart]
    return {
        "name": path.name,
        "hash": plan.hash,
        "summary": [*([_bits(plan)] if plan.layers else []), *([_file(plan)] if plan.tensors else [])],
        "maps": list(_maps(plan)),
        "scores": [
            (title, KL if record.get("fitness", "kl") == "kl" else ERRORS, _score_rows(record))
            for title, record in (("Activation bits", plan.search), ("ggml types", plan.file))
            if record.get("scores")
        ],
        "charts": charts,
        "loudest": list(_loudest(path, plan)),
        "made_by": _made_by(plan),
        "missing": missing,
    }


def _maps(plan: Plan) -> Iterator[PlanMap]:
    bits = {name: entry.a_bits for name, entry in plan.layers.items()}
    if bits:
        yield _map("Bits of activations", {name: f"A{value}" for name, value in bits.items()}, _activation_rank)
    if plan.tensors:
        yield _map("ggml types of weights", plan.tensors, bits_per_weight)


def _activation_rank(kind: str) -> float:
    return float(kind.removeprefix("A"))


def _map(title: str, formats: Mapping[str, str], rank: Callable[[str], float]) -> PlanMap:
    order = sorted(set(formats.values()), key=rank)
    shades = {kind: (0.12 + 0.8 * at / max(len(order) - 1, 1)) for at, kind in enumerate(order)}
    kinds: list[str] = []
    blocks: dict[str, dict[str, MapCell]] = {}
    others = []
    for name, kind in formats.items():
        cell = _cell(name, kind, shades[kind])
        place = re.fullmatch(r".*\.(\d+)\..*?([^.]+)", name)
        if place is None:
            others.append(cell)
            continue
        short = place[2].removesuffix("_proj")
        if short not in kinds:
            kinds.append(short)
        blocks.setdefault(place[1], {})[short] = cell
    rows = {block: [cells.get(kind) for kind in kinds] for block, cells in blocks.items()}
    counts = Counter(formats.values())
    return PlanMap(title, kinds, rows, others, [(_cell("", kind, shades[kind]), counts[kind]) for kind in order])


def _cell(name: str, text: str, shade: float) -> MapCell:
    red, green, blue, _ = colormaps[COLOUR_MAP](shade)
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2  # WCAG 2.1
    colour = "#" + "".join(f"{round(255 * channel):02x}" for channel in (red, green, blue))
    return MapCell(name, text, colour, "#ffffff" if light < 0.179 else "#000000")


def _score_rows(record: Mapping[str, Any]) -> list[list[str]]:
    scores, validation = record.get("scores") or {}, record.get("validation") or {}
    labels = dict.fromkeys([*scores, *validation])
    rows = [[label, scores.get(label), validation.get(label)] for label in labels]
    return [[format_cell(cell) for cell in row] for row in rows]


def _charts(path: Path, plan: Plan, missing: list[str]) -> Iterator[Chart | None]:
    """The pictures whose numbers lie beside the plan; those that do not are named in ``missing``."""
    with scratch_folder() as folder:

        def chart(kind: str, title: str, text: str, draw: Callable[[Path, Path], object]) -> Chart | None:
            numbers, picture = beside(path, kind), folder / f"{kind}.svg"
            if not numbers.is_file():
                missing.append(numbers.name)
                return None
            try:
                draw(picture, numbers)
            except (KeyError, TypeError, ValueError, HalfbyteError) as error:
                missing.append(f"{numbers.name} (cannot be drawn: {error})")
                return None
            return Chart(title, text, _inline(picture.read_text(encoding="utf-8"), f"{path.stem}-{kind}"))

        if plan.layers:
            yield chart("sensitivity.json", "Where few activation bits hurt", SENSITIVITY, _sensitivity_of(plan))
            yield chart("history.json", "How the search of activation bits went", CONVERGENCE, _history_of(plan))
        if plan.tensors:
            yield chart("types.json", "How the search of ggml types went", CONVERGENCE, _history_of(plan))
        if plan.layers and beside(path, "front.json").is_file():
            yield chart("front.json", "What other budgets would give", FRONT, _front_of(plan))
        if plan.tensors and beside(path, "types-front.csv").is_file():
            yield chart("types-front.csv", "What other sizes would give", FRONT, _sizes_of(plan))


SENSITIVITY = "Mean squared error of each layer's output with the fewest activation bits, relative to the most."
CONVERGENCE = "Each point is a generation of the genetic algorithm; lines are what it started from and had to beat."
FRONT = "KL on the validation text; bars are the noise floor."


def _sensitivity_of(plan: Plan) -> Callable[[Path, Path], object]:
    def draw(picture: Path, numbers: Path) -> object:
        found = read_json(numbers, "sensitivity")
        low, high = found["a_bits"]
        return draw_sensitivity(picture, plan, found["layers"], (low, high))

    return draw


def _history_of(plan: Plan) -> Callable[[Path, Path], object]:
    return lambda picture, numbers: draw_convergence(picture, plan, read_json(numbers, "history"))


def _front_of(plan: Plan) -> Callable[[Path, Path], object]:
    return lambda picture, numbers: draw_bits_front(picture, plan, read_json(numbers, "front")["points"])


def _sizes_of(plan: Plan) -> Callable[[Path, Path], object]:
    def draw(picture: Path, numbers: Path) -> object:
        points = [
            {key: float(value) for key, value in row.items() if key != "ftype" and value} for row in _csv(numbers)
        ]
        return draw_sizes_front(picture, plan, points, plan.file["nbytes"])

    return draw


def _loudest(path: Path, plan: Plan) -> list[dict[str, Any]]:
    """Tables of what alone makes the whole model lose most: units at the fewest activation bits, and matrices."""
    tables = []
    for there, table in ((plan.layers, _loudest_units), (plan.tensors, _loudest_matrices)):
        with suppress(KeyError, TypeError, ValueError, OSError, HalfbyteError):
            if there:
                tables.append(table(path))
    return tables


def _loudest_units(path: Path) -> dict[str, Any]:
    found = read_json(beside(path, "sensitivity.json"), "sensitivity")
    rows = sorted(found["units"], key=lambda row: -row["loss"])[:LOUDEST]
    return {
        "title": f"The units that lose most at A{found['a_bits'][0]} alone",
        "headers": ["unit", "the plan has", found["score_label"]],
        "rows": [[row["unit"], f"A{row['a_bits']}", significant(float(row["loss"]))] for row in rows],
    }


def _loudest_matrices(path: Path) -> dict[str, Any]:
    rows = sorted(_csv(beside(path, "types.csv")), key=lambda row: -float(row["kl_alone"]))[:LOUDEST]
    return {
        "title": "The matrices that lose most alone",
        "headers": ["matrix", "type", "size", "KL alone"],
        "rows": [
            [row["matrix"], row["type"], format_bytes(int(row["bytes"])), significant(float(row["kl_alone"]))]
            for row in rows
        ],
    }


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def _inline(svg: str, prefix: str) -> Markup:
    """An SVG file as part of a page: black follows the page's text, and names are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("#000000", "currentColor")
    for colour in DARK:
        svg = svg.replace(colour, f"var(--{colour[1:]})")
    prefix = re.sub(r"\W", "-", prefix)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return Markup(re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg))


def _comparison_section(comparison: Comparison) -> dict[str, Any]:
    measured = [row for row in comparison.rows if row.measured]
    rows: list[list[Cell]] = [
        [
            row.name,
            format_bytes(row.number("measured", "bytes")),
            significant(row.number("quality", "kld_mean")),
            _percent(row.number("quality", "top1_agreement")),
            significant(row.number("quality", "ppl"), 4),
            significant(row.number("measured", "generation_tokens_per_second")),
            format_ratio(row.speed_up),
            significant(row.number("measured", "prompt_tokens_per_second")),
            format_bytes(row.number("measured", "peak_memory")),
            format_seconds(row.number("measured", "load_seconds")),
            row.engine,
        ]
        for row in measured
    ]
    first = next((row.sample for row in measured if row.sample), "")
    return {
        "headers": COMPARED,
        "about": f"text {comparison.text}; {comparison.machine}",
        "prompt": comparison.prompt,
        "rows": rows,
        "missing": [(row.name, row.missing) for row in comparison.rows if row.missing],
        "notes": [(row.name, row.note) for row in comparison.rows if row.note],
        "samples": [(row.name, _marked(first, row.sample)) for row in measured if row.sample],
    }


def _marked(first: str, other: str) -> Markup:
    """``other``, with what differs from ``first`` marked, word by word."""
    before, after = (re.findall(r"\s+|\S+", text) for text in (first, other))
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        text = Markup.escape("".join(after[start:end]))
        parts.append(text if kind == "equal" or not text else Markup("<mark>{}</mark>").format(text))
    return Markup("").join(parts)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"


def _made_by(plan: Plan) -> list[tuple[str, str]]:
    record = plan.search or plan.file
    tokens = [f"{record[key]} {key.removesuffix('_tokens')}" for key in TOKENS if key in record]
    note = plan.text.get("note")
    rows = [
        ("model", f"{plan.model_id} ({plan.fingerprint})"),
        ("target", f"{plan.target} {plan.hardware}".strip()),
        ("plan", plan.hash),
        ("transforms", ", ".join(plan.transforms or plan.file.get("transforms", ())) or "none"),
        ("weight codes", plan.weights if plan.layers else ""),
        ("text", f"{plan.text.get('name', '')}" + (f" ({note})" if note else "")),
        ("tokens", ", ".join(tokens)),
        ("seed", str(plan.seed)),
        *((key, str(value)) for key, value in plan.versions.items()),
    ]
    return [(key, value) for key, value in rows if value]


KL = (
    "KL(original ‖ quantised) of next-token distributions, nats per token, simulated. "
    "The validation text, which the search has not used, decided between its finalists."
)
ERRORS = "A sum of layer errors, simulated: the search minimised this, and not the whole model's KL."
TOKENS = ("calib_tokens", "search_tokens", "valid_tokens")
