"""What a page says of a comparison in real engines, as ``halfbyte compare --json`` has written it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from halfbyte.report.summary import COMPARISON_HEADERS, comparison_cells
from halfbyte.report.tables import format_bytes, significant

ALIKE = 0.02  # difference of two sizes, relative to one, up to which they count as the same
MARKED_WORDS = 2000  # of a text at most; of longer ones nothing is marked


@dataclass(frozen=True)
class Facts:
    """What was measured of a model, as far as the page shows it; see ``halfbyte.evaluate.worker.Measured``."""

    bytes: float
    load_seconds: float | None = None
    peak_memory: float | None = None
    prompt_tokens_per_second: float | None = None
    generation_tokens_per_second: float | None = None
    sample: str | None = None


@dataclass(frozen=True)
class Scores:
    """How far its predictions are from the original's; see ``halfbyte.evaluate.quality.Quality``."""

    ppl: float | None = None
    kld_mean: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Row:
    """One model; see ``halfbyte.evaluate.compare.CompareRow``."""

    name: str
    engine: str = ""
    measured: Facts | None = None
    quality: Scores | None = None
    speed_up: float | None = None
    missing: str = ""
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All of it; keys that the page does not need are left alone."""

    rows: list[Row]
    model: str
    text: str
    machine: str
    plan: str | None = None
    prompt: str = ""


def headline(comparisons: Sequence[Comparison], plans: Collection[str]) -> str:
    """The newest comparison of our file with Q4_K_M in a sentence; empty if there is none of these plans (hashes)."""
    for comparison in reversed(comparisons):
        rows = {row.name: row for row in comparison.rows}
        ours, theirs = rows.get("mixed"), rows.get("Q4_K_M")
        if comparison.plan in plans and ours and theirs and not ours.note:  # a note: the file holds another plan
            said = _headline(ours, theirs, comparison.machine)
            if said:
                return said
    return ""


def _headline(ours: Row, theirs: Row, machine: str) -> str:
    """What was measured of both; empty without KL."""
    if not (ours.measured and theirs.measured and ours.quality and theirs.quality):
        return ""
    if ours.quality.kld_mean is None or theirs.quality.kld_mean is None:
        return ""
    size, other = ours.measured.bytes, theirs.measured.bytes
    alike = abs(size - other) <= ALIKE * other
    text = f"At {format_bytes(size)}, {'the size of' if alike else f'{format_bytes(other)} for'} {theirs.name}, "
    text += f"KL to the original is {significant(ours.quality.kld_mean)} against {significant(theirs.quality.kld_mean)}"
    speed, their_speed = ours.measured.generation_tokens_per_second, theirs.measured.generation_tokens_per_second
    if speed and their_speed:
        text += f"; generation {significant(speed)} tokens/s against {significant(their_speed)} on {machine}"
    return f"{text}."


def section_of(comparison: Comparison) -> dict[str, Any]:
    """For the template: the table, what is missing, and the texts."""
    measured = [row for row in comparison.rows if row.measured]
    samples = [(row.name, row.measured.sample.strip()) for row in measured if row.measured and row.measured.sample]
    about = [f"text {comparison.text}", comparison.machine, *([f"plan {comparison.plan}"] if comparison.plan else [])]
    return {
        "headers": COMPARISON_HEADERS,
        "about": "; ".join(about),
        "prompt": comparison.prompt,
        "rows": [comparison_cells(row) for row in measured],
        "missing": [(row.name, row.missing) for row in comparison.rows if row.missing],
        "notes": [(row.name, row.note) for row in comparison.rows if row.note],
        "samples": [(name, _marked(samples[0][1], text)) for name, text in samples],
    }


def _marked(first: str, other: str) -> Markup:
    """``other``, with what differs from ``first`` marked, word by word."""
    before, after = (re.findall(r"\s+|\S+", text) for text in (first, other))
    if max(len(before), len(after)) > MARKED_WORDS:
        return Markup.escape(other)
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        text = Markup.escape("".join(after[start:end]))
        parts.append(text if kind == "equal" or not text else Markup("<mark>{}</mark>").format(text))
    return Markup("").join(parts)
