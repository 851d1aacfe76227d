"""Numbers and tables as text: for the terminal, for Markdown, for a spreadsheet."""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Sequence

from halfbyte.core.errors import HalfbyteError

MISSING = "—"
NUMBER = re.compile(r"[-+±]?(\d[\d.,]*(e[-+]?\d+)?|nan|inf) ?(×|%|[kMGT]?i?B|ms|s|min( \d\d s)?|h( \d\d min)?)?")

Cell = str | int | float | bool | None


def significant(value: float | None, digits: int = 3) -> str:
    """``value`` rounded to ``digits`` significant digits: 0.0468, 12.3, 1190; tiny or huge ones as 1.2e-05.

    None is a dash; NaN and infinities are named.
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    text = f"{value:.{digits - 1}e}"
    exponent = int(text.partition("e")[2])
    return f"{float(text):.{max(digits - 1 - exponent, 0)}f}" if -5 < exponent < 9 else text


def format_bytes(count: float | None) -> str:
    """A size in bytes as file managers show it, in powers of 1000: 512 B, 93.5 kB, 105.5 MB, 4.68 GB."""
    if count is None or not math.isfinite(count):
        return significant(count)
    for unit, size, decimals in (("B", 1, 0), ("kB", 1e3, 1), ("MB", 1e6, 1), ("GB", 1e9, 2)):
        text = f"{count / size:.{decimals}f}"
        if abs(float(text)) < 1000:
            return f"{text} {unit}"
    return f"{count / 1e12:.2f} TB"


def format_seconds(seconds: float | None) -> str:
    """A duration with the parts that matter: 435 ms, 12.3 s, 4 min 05 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return significant(seconds)
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds < 0.9995:
        return f"{significant(seconds * 1000)} ms"
    if seconds < 59.95:
        return f"{significant(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_ratio(ratio: float | None) -> str:
    """How many times: 2.76×, 0.85×."""
    return MISSING if ratio is None else f"{significant(ratio)}×"


def format_cell(value: Cell) -> str:
    """A table cell: None as a dash, floats to three significant digits, the rest as it is."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return significant(value) if isinstance(value, float) else str(value)


def display_width(text: str) -> int:
    """Columns that ``text`` takes in a terminal: wide East Asian characters two, combining marks none (UAX #11)."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)


def text_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], align: str | None = None) -> str:
    """A table for a monospaced font, without a newline at the end.

    Args:
        headers: column titles.
        rows: cells, see :func:`format_cell`; a newline in a cell becomes a space.
        align: one letter per column, ``l``, ``r`` or ``c``; None puts columns of numbers to the right.

    Raises:
        HalfbyteError: a row has another length than the headers, or ``align`` does not fit.
    """
    align = _alignment(headers, rows, align)
    cells = [[_one_line(text) for text in line] for line in _formatted(headers, rows)]
    widths = [max(display_width(line[column]) for line in cells) for column in range(len(headers))]
    lines = ["  ".join(_padded(*part) for part in zip(line, widths, align, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], align: str | None = None) -> str:
    """The same as a GitHub-flavoured Markdown table (GFM spec, section 4.10), aligned in its source too.

    Pipes and backslashes in cells are escaped, newlines become ``<br>``.

    Raises:
        HalfbyteError: as :func:`text_table`.
    """
    align = _alignment(headers, rows, align)
    cells = [[_markdown(text) for text in line] for line in _formatted(headers, rows)]
    widths = [max(3, *(display_width(line[column]) for line in cells)) for column in range(len(headers))]
    marks = {"l": ("-", "-"), "r": ("-", ":"), "c": (":", ":")}
    rule = [marks[side][0] + "-" * (width - 2) + marks[side][1] for side, width in zip(align, widths, strict=True)]
    lines = [[_padded(*part) for part in zip(line, widths, align, strict=True)] for line in cells]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_text(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Comma-separated values (RFC 4180, but lines end in a newline alone): floats in full, None as an empty field.

    Raises:
        HalfbyteError: a row has another length than the headers.
    """
    _check_lengths(headers, rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows(rows)
    return buffer.getvalue()


def _check_lengths(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    for number, row in enumerate(rows):
        if len(row) != len(headers):
            raise HalfbyteError(f"row {number}: row has the wrong length, expected {len(headers)}, got {len(row)}")


def _alignment(headers: Sequence[str], rows: Sequence[Sequence[Cell]], align: str | None) -> str:
    """One letter per column; without ``align`` columns of nothing but numbers go right."""
    _check_lengths(headers, rows)
    if align is None:
        return "".join("r" if _numeric([row[column] for row in rows]) else "l" for column in range(len(headers)))
    if len(align) != len(headers) or set(align) - set("lrc"):
        raise HalfbyteError(f"align: alignment does not fit, expected {len(headers)} of l, r, c, got {align}")
    return align


def _numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column holds numbers, with or without a unit ("4.68 GB", "2.76×"), and nothing else but gaps."""
    present = [format_cell(cell) for cell in cells if cell is not None and cell != MISSING]
    return bool(present) and all(NUMBER.fullmatch(text) for text in present)


def _formatted(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[list[str]]:
    return [list(headers), *([format_cell(cell) for cell in row] for row in rows)]


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _markdown(text: str) -> str:
    return "<br>".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())


def _padded(text: str, width: int, side: str) -> str:
    gap = width - display_width(text)
    left = {"l": 0, "r": gap, "c": gap // 2}[side]
    return " " * left + text + " " * (gap - left)
