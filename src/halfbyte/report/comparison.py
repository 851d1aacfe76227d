"""The comparison table and its sample texts."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.evaluate.compare import CompareRow
from halfbyte.report.tables import format_bytes, format_ratio, format_seconds, significant, text_table

HEADERS = (
    "model",
    "engine",
    "size",
    "load",
    "prompt tok/s",
    "gen tok/s",
    "speed-up",
    "peak memory",
    "ppl",
    "KLD",
    "same top",
)


def comparison_table(rows: Sequence[CompareRow]) -> str:
    """One line per model that was measured, then one per missing model with the reason."""
    table = [_cells(row) for row in rows if row.measured]
    missing = [f"{row.name}: {row.missing}" for row in rows if row.missing]
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([text_table(HEADERS, table), *missing, *notes])


def _cells(row: CompareRow) -> list[str | None]:
    measured, quality = row.measured or {}, row.quality
    top1 = quality.top1_agreement if quality else None
    return [
        row.name,
        row.engine,
        format_bytes(measured["bytes"]),
        format_seconds(measured["load_seconds"]),
        significant(measured.get("prompt_tokens_per_second")),
        significant(measured.get("generation_tokens_per_second")),
        format_ratio(row.speed_up),
        format_bytes(measured["peak_memory"]),
        significant(quality.ppl if quality else None, 4),
        significant(quality.kld_mean if quality else None),
        None if top1 is None else f"{100 * top1:.1f}%",
    ]


def comparison_texts(rows: Sequence[CompareRow], prompt: str) -> str:
    """What each model answers to the same prompt."""
    lines = [f"prompt: {prompt}"]
    for row in rows:
        if row.measured and row.measured.get("sample"):
            lines.append(f"\n[{row.name}, {row.engine}] {row.measured['sample'].strip()}")
    return "\n".join(lines)
