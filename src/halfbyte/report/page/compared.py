"""What a page says of a comparison in real engines, as ``halfbyte compare --json`` has written it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from halfbyte.core.language import say
from halfbyte.report.summary import COMPARISON_HEADERS, comparison_cells, kl_of_texts
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
    kld_of_texts: dict[str, float] = field(default_factory=dict)


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
    plan: str | None = None


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
    """The newest comparison of a file of one of these plans (hashes) with Q4_K_M, in a sentence; empty without one."""
    for comparison in reversed(comparisons):
        theirs = next((row for row in comparison.rows if row.name == "Q4_K_M"), None)
        for ours in (row for row in comparison.rows if row.plan in plans):
            if theirs and (said := _headline(ours, theirs, comparison.machine)):
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
    text = say(
        "At {size}, the size of {other}, KL to the original is {kl} against {their_kl}"
        if alike
        else "At {size}, {their_size} for {other}, KL to the original is {kl} against {their_kl}",
        size=format_bytes(size),
        their_size=format_bytes(other),
        other=theirs.name,
        kl=significant(ours.quality.kld_mean),
        their_kl=significant(theirs.quality.kld_mean),
    )
    speed, their_speed = ours.measured.generation_tokens_per_second, theirs.measured.generation_tokens_per_second
    if speed and their_speed and ours.engine == theirs.engine:  # else it may be another machine
        text += say(
            "; generation {speed} tokens/s against {their_speed} on {machine}",
            speed=significant(speed),
            their_speed=significant(their_speed),
            machine=machine,
        )
    return say("{sentence}.", sentence=text)


def section_of(comparison: Comparison) -> dict[str, Any]:
    """For the template: the table, what is missing, and the texts."""
    measured = [row for row in comparison.rows if row.measured]
    samples = [(row.name, row.measured.sample.strip()) for row in measured if row.measured and row.measured.sample]
    about = [say("text {name}", name=comparison.text), comparison.machine]
    if comparison.plan:
        about.append(say("plan {hash}", hash=comparison.plan))
    texts = kl_of_texts(measured)
    return {
        "headers": list(map(say, COMPARISON_HEADERS)),
        "texts": {"headers": texts[0], "rows": texts[1]} if texts else None,
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
