"""One HTML page that says what a search decided, why it can be trusted, and what it costs.

It is made from the plan and the reports beside it, holds everything that it shows, and needs neither network nor
scripts. What is nowhere else (comparisons, what was exported, what stages took) the page keeps itself, so that it can
be made anew.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from halfbyte.arguments import checked_path
from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.files import short_name, write_text
from halfbyte.core.guard import Touched, guarded
from halfbyte.core.language import ENGLISH, say, speaking, spoken
from halfbyte.core.progress import warn
from halfbyte.core.schema import parsed, read_json
from halfbyte.core.stages import Stage
from halfbyte.options import ReportOptions
from halfbyte.plan import Plan, check_suffix, load_plan, plan_files
from halfbyte.report.page.charts import DARK, charts_of
from halfbyte.report.page.compared import Comparison, headline, section_of
from halfbyte.report.page.plan_map import maps_of
from halfbyte.report.search_reports import beside
from halfbyte.report.summary import activation_bits, decided
from halfbyte.report.tables import format_bytes, format_cell, format_seconds, significant

PAGE = "report.html"
KEPT = re.compile(r'<script type="application/json" id="kept">(.*?)</script>', re.DOTALL)
MOST_COMPARISONS = 3  # that a page keeps
SHORTEST = 0.5  # seconds of a stage that is named
MOST_ROWS = 12  # units and matrices that are named because they lose most
KL = (
    "KL(original ‖ quantised) of next-token distributions, nats per token, simulated. "
    "The validation text, which the search has not used, decided between its finalists."
)
ERRORS = "A sum of layer errors, simulated: the search minimised this, and not the whole model's KL."
TOKENS = ("calib_tokens", "search_tokens", "valid_tokens")


@dataclass(frozen=True)
class Record:
    """What a plan says of one search: :attr:`Plan.search` or :attr:`Plan.file`."""

    scores: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    fitness: str = "kl"
    winner: str = ""
    finalists: int = 0
    ties: int = 0
    noise_floor: float = 0.0
    transforms: list[str] = field(default_factory=list)
    nbytes: float = 0.0
    calib_tokens: int = 0
    search_tokens: int = 0
    valid_tokens: int = 0


@dataclass(frozen=True)
class Exported:
    """A file or folder that a plan was exported as.

    Attributes:
        path: where it was written.
        bytes: how large it is.
        checked: what the check saw, in a sentence.
    """

    path: str
    bytes: int
    checked: str = ""


@dataclass
class Made:
    """What a page keeps of a plan, because it is nowhere else.

    Attributes:
        stages: what each stage of the search took.
        resumed: only since it was resumed.
        exported: the newest last.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    resumed: bool = False
    exported: list[Exported] = field(default_factory=list)


@dataclass
class Kept:
    """What a page holds so that it can be made anew.

    Attributes:
        comparisons: as ``halfbyte compare --json`` writes them, the newest last.
        plans: hash of a plan -> what is known of it.
        language: that the page is in.
    """

    comparisons: list[dict[str, Any]] = field(default_factory=list)
    plans: dict[str, Made] = field(default_factory=dict)
    language: str = ENGLISH

    def add(self, other: Kept) -> None:
        """What another page holds too."""
        self.comparisons += other.comparisons
        for hash_, made in other.plans.items():
            own = self.plans.setdefault(hash_, made)
            own.exported += [one for one in made.exported if one not in own.exported]


def make_report(options: ReportOptions) -> Path:
    """Write the page of one or several plans anew, with comparisons, and with what their pages have kept.

    Raises:
        HalfbyteError: a plan or comparison is missing, damaged, or of another model; the output exists.
    """
    configs = [Path(checked_path(one.strip(), "--config")) for one in options.config.split(",")]
    for config in configs:
        check_suffix(config)
    given = (options.comparison or "").split(",") if options.comparison else []
    comparisons = [checked_path(one.strip(), "--comparison") for one in given]
    if len(configs) > 1 and not options.output:
        raise HalfbyteError(
            "--output: expected a name for the page of several plans", fix="choose one, such as all.html"
        )
    page = Path(options.output) if options.output else beside(configs[0], PAGE)
    files = [str(file) for config in configs for file in plan_files(config)]
    with guarded(Touched(inputs=[*files, *comparisons], outputs=[page]), json=options.json, force=options.force):
        kept = Kept()
        for earlier in dict.fromkeys([page, *(beside(config, PAGE) for config in configs)]):
            kept.add(_kept(earlier) or Kept())
        kept.comparisons += [read_json(one, "comparison") for one in comparisons]
        write_page(page, configs, kept)
    return page


def write_page(page: Path, configs: Sequence[Path], kept: Kept | None = None) -> Path:
    """Write the page of the plans at ``configs``, in the language that is spoken.

    Args:
        kept: what is not beside the plans; the page shows the last few comparisons.

    Raises:
        HalfbyteError: a plan cannot be read, or a comparison is of another model.
    """
    kept = kept or Kept()
    plans = [load_plan(path, with_codes=False) for path in configs]
    names = {short_name(plan.model_id) for plan in plans}
    records = [one for at, one in enumerate(kept.comparisons) if one not in kept.comparisons[at + 1 :]]
    made = {plan.hash: kept.plans.get(plan.hash, Made()) for plan in plans}
    kept = Kept(records[-MOST_COMPARISONS:], made, spoken())
    found = [parsed(Comparison, dict(one), where="comparison") for one in kept.comparisons]
    for one in found:
        if short_name(one.model) not in names:
            raise HalfbyteError(f"comparison: of another model, expected {', '.join(names)}, got {one.model}")
    sections = [_Section(path, plan, kept.plans[plan.hash]) for path, plan in zip(configs, plans, strict=True)]
    environment = Environment(
        loader=PackageLoader("halfbyte.report.page", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html.jinja").render(
        say=say,
        language=spoken(),
        dark={colour[1:]: other for colour, other in DARK.items()},
        title=", ".join(sorted(names)),
        sections=[section.values(f"plan{at}") for at, section in enumerate(sections)],
        sentence=headline(found, {plan.hash for plan in plans}) or sections[0].sentence,
        comparisons=[section_of(one) for one in found],
        kept=Markup(json.dumps(asdict(kept)).replace("<", "\\u003c")),
    )
    return write_text(page, text)


def add_comparison(config: str | Path, record: Mapping[str, Any]) -> Path | None:
    """Put a comparison into the page beside the plan at ``config``; see :func:`add_to_page`."""
    return add_to_page(config, lambda kept: kept.comparisons.append(dict(record)))


def add_export(config: str | Path, plan: str, exported: Exported) -> Path | None:
    """The same for what the plan (its hash) was exported as; a file that is written again replaces itself."""

    def add(kept: Kept) -> None:
        made = kept.plans.setdefault(plan, Made())
        made.exported[:] = [one for one in made.exported if one.path != exported.path] + [exported]

    return add_to_page(config, add)


def add_to_page(config: str | Path, change: Callable[[Kept], None]) -> Path | None:
    """Change what the page beside the plan at ``config`` keeps, and make it anew.

    Returns:
        The page; None if there is none that halfbyte wrote, or it cannot be written: then a warning says why.
    """
    page = beside(Path(config), PAGE)
    if _kept(page) is None:
        return None
    try:
        with guarded(Touched(inputs=plan_files(config), outputs=[page]), json=None, force=True):
            kept = _kept(page) or Kept()  # read where nobody else writes
            change(kept)
            with speaking(kept.language):
                return write_page(page, [Path(config)], kept)
    except Exception as error:  # noqa: BLE001 - what was measured must not be lost for a page
        warn(f"{page} is as it was: {first_line(error)}")
        return None


def _kept(page: Path) -> Kept | None:
    """What a page holds; None if there is no page, or halfbyte did not write it."""
    if not page.is_file():
        return None
    with suppress(ValueError):
        kept = KEPT.search(page.read_text(encoding="utf-8"))
        return None if kept is None else parsed(Kept, json.loads(kept[1]), where=page)
    return None


class _Section:
    """What the page says of one plan."""

    def __init__(self, path: Path, plan: Plan, made: Made) -> None:
        self.path, self.plan, self.made = path, plan, made
        self.bits = parsed(Record, dict(plan.search), where=f"{path}, search")
        self.file = parsed(Record, dict(plan.file), where=f"{path}, file")

    @property
    def sentence(self) -> str:
        """The result, where nothing was compared."""
        what, record = (self._size, self.file) if self.plan.tensors else (self._bits, self.bits)
        return say("{what}: {scores}.", what=what(), scores=_scores(record))

    def values(self, prefix: str) -> dict[str, Any]:
        """For the template; ``prefix`` makes identifiers unique."""
        charts, missing = charts_of(self.path, self.plan, prefix)
        there = [(self.plan.layers, self._bits), (self.plan.tensors, self._size)]
        return {
            "name": str(self.path),
            "hash": self.plan.hash,
            "summary": [said() for some, said in there if some],
            "maps": maps_of(self.plan),
            "scores": [
                {
                    "title": title,
                    "label": say(KL) if record.fitness == "kl" else say(ERRORS),
                    "rows": _score_rows(record),
                    "decided": decided(record) if record.winner else "",
                }
                for title, record in ((say("Activation bits"), self.bits), (say("ggml types"), self.file))
                if record.scores
            ],
            "charts": charts,
            "dearest": self._dearest(),
            "exported": [[one.path, format_bytes(one.bytes), one.checked] for one in self.made.exported],
            "stages": [
                [name, format_seconds(one.seconds), format_bytes(one.host), format_bytes(one.device)]
                for name, one in self.made.stages.items()
                if one.seconds >= SHORTEST
            ],
            "stages_of": say("Time and memory since it was resumed" if self.made.resumed else "Time and memory"),
            "made_by": self._made_by(),
            "missing": missing,
        }

    def _bits(self) -> str:
        return activation_bits(self.plan)

    def _size(self) -> str:
        tensors = self.plan.tensors
        return say(
            "file: {size} for {count} matrices of {kinds} ggml types",
            size=format_bytes(self.file.nbytes),
            count=len(tensors),
            kinds=len(set(tensors.values())),
        )

    def _dearest(self) -> list[dict[str, Any]]:
        """Tables of what alone makes the whole model lose most: units at the fewest activation bits, and matrices."""
        tables = []
        for some, table in ((self.plan.layers, _dearest_units), (self.plan.tensors, _dearest_matrices)):
            with suppress(KeyError, TypeError, ValueError, OSError, HalfbyteError):  # the charts name what is missing
                if some:
                    tables.append(table(self.path))
        return tables

    def _made_by(self) -> list[tuple[str, str]]:
        plan, record = self.plan, self.bits if self.plan.layers else self.file
        tokens = [f"{getattr(record, key)} {key.removesuffix('_tokens')}" for key in TOKENS if getattr(record, key)]
        note = plan.text.get("note")
        rows = [
            (say("model"), f"{plan.model_id} ({plan.fingerprint})"),
            (say("target"), f"{plan.target} {plan.hardware}".strip()),
            (say("plan"), plan.hash),
            (say("transforms, activation bits"), (", ".join(plan.transforms) or say("none")) if plan.layers else ""),
            (say("transforms, file"), (", ".join(self.file.transforms) or say("none")) if plan.tensors else ""),
            (say("weight codes"), plan.weights if plan.layers else ""),
            (say("text"), f"{plan.text.get('name', '')}" + (f" ({note})" if note else "")),
            (say("tokens"), ", ".join(tokens)),
            (say("seed"), str(plan.seed)),
            *plan.versions.items(),
        ]
        return [(key, value) for key, value in rows if value]


def _scores(record: Record) -> str:
    """The plan's score, and those of the ends of the menu and of llama.cpp's own types."""
    if record.fitness != "kl":
        return say("nothing was measured on the whole model, the search minimised a sum of layer errors")
    validated = bool(record.validation)
    scores, where = record.validation or record.scores, say("validation text" if validated else "search text")
    plan = [score for label, score in scores.items() if label.startswith("plan")]
    if not plan:
        return say("no score was measured on the whole model")
    others = {label: score for label, score in scores.items() if label.startswith(("all ", "types of "))}
    said = [say("KL to the original on the {text} {score}", text=where, score=significant(min(plan)))]
    return ", ".join([*said, *(f"{label} {significant(score)}" for label, score in others.items())])


def _score_rows(record: Record) -> list[list[str]]:
    labels = dict.fromkeys([*record.scores, *record.validation])
    rows = [[label, record.scores.get(label), record.validation.get(label)] for label in labels]
    return [[format_cell(cell) for cell in row] for row in rows]


def _dearest_units(path: Path) -> dict[str, Any]:
    found = read_json(beside(path, "sensitivity.json"), "sensitivity")
    low, high = found["a_bits"]
    rows = sorted(found["units"], key=lambda row: -row["loss"])[:MOST_ROWS]
    return {
        "title": say("The units that lose most at A{bits} alone", bits=low),
        "headers": [
            say("unit"),
            say("the plan has"),
            say("{score}, more than at A{bits}", score=found["score_label"], bits=high),
        ],
        "rows": [[row["unit"], f"A{row['a_bits']}", significant(float(row["loss"]))] for row in rows],
    }


def _dearest_matrices(path: Path) -> dict[str, Any]:
    with beside(path, "types.csv").open(encoding="utf-8", newline="") as handle:
        rows = sorted(csv.DictReader(handle), key=lambda row: -float(row["kl_alone"]))[:MOST_ROWS]
    return {
        "title": say("The matrices that lose most alone"),
        "headers": [say("matrix"), say("type"), say("size"), say("KL alone, predicted")],
        "rows": [
            [row["matrix"], row["type"], format_bytes(int(row["bytes"])), significant(float(row["kl_alone"]))]
            for row in rows
        ],
    }
