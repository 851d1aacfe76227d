from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.core.errors import HalfbyteError
from halfbyte.report.tables import (
    csv_text,
    display_width,
    format_bytes,
    format_ratio,
    format_seconds,
    markdown_table,
    significant,
    text_table,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04678, "0.0468"),
        (0.12, "0.120"),
        (12.345, "12.3"),
        (1189.6, "1190"),
        (999.6, "1000"),
        (0.9996, "1.00"),
        (0.000123456, "0.000123"),
        (0.0000123456, "1.23e-05"),
        (-0.5, "-0.500"),
        (0, "0"),
        (144_811_072, "145000000"),
        (1.5e12, "1.50e+12"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (None, "—"),
    ],
)
def test_significant(value, text):
    assert significant(value) == text


def test_significant_digits():
    assert [significant(2 / 3, digits) for digits in (1, 2, 4)] == ["0.7", "0.67", "0.6667"]


@given(st.floats(1e-4, 1e8), st.integers(1, 6))
def test_significant_is_near(value, digits):
    assert float(significant(value, digits)) == pytest.approx(value, rel=0.5001 * 10.0 ** (1 - digits))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (105_454_368, "105.5 MB"),
        (999_960_000, "1.00 GB"),
        (4_683_073_248, "4.68 GB"),
        (15_231_233_024, "15.23 GB"),
        (2.5e12, "2.50 TB"),
        (-3_200_000, "-3.2 MB"),
        (None, "—"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.00045, "0.450 ms"),
        (0.435, "435 ms"),
        (0.9999, "1.00 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (-61, "-1 min 01 s"),
        (float("inf"), "inf"),
        (None, "—"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_format_ratio():
    assert [format_ratio(ratio) for ratio in (2.756, 0.85, 120, None)] == ["2.76×", "0.850×", "120×", "—"]


HEADERS = ("file", "size", "KLD")
ROWS = [("Q4_K_M | imatrix", format_bytes(105_454_368), 0.04678), ("模型", None, None)]


def test_text_table():
    assert text_table(HEADERS, ROWS).split("\n") == [
        "file                  size     KLD",
        "────────────────  ────────  ──────",
        "Q4_K_M | imatrix  105.5 MB  0.0468",
        "模型                     —       —",
    ]


def test_markdown_table():
    assert markdown_table(HEADERS, ROWS, "lcr").split("\n") == [
        "| file              |   size   |    KLD |",
        "| ----------------- | :------: | -----: |",
        "| Q4_K_M \\| imatrix | 105.5 MB | 0.0468 |",
        "| 模型              |    —     |      — |",
    ]


def test_markdown_keeps_a_cell_in_its_row():
    assert markdown_table(["a"], [["one\ntwo \\ three"]]).split("\n")[-1] == "| one<br>two \\\\ three |"
    assert text_table(["a"], [["one\ntwo"]]).split("\n")[-1] == "one two"


def test_only_columns_of_numbers_go_right():
    lines = text_table(["bits", "name"], [[4, "4-bit"], [None, "7B"], [16, True]]).split("\n")
    assert lines[2:] == ["   4  4-bit", "   —  7B", "  16  yes"]


def test_tables_without_rows():
    assert text_table(["a", "bb"], []) == "a  bb\n─  ──"
    assert markdown_table(["a", "bb"], []) == "| a   | bb  |\n| --- | --- |"
    assert csv_text(["a", "bb"], []) == "a,bb\n"


def test_display_width():
    assert [display_width(text) for text in ("KL — α", "模型", "e\u0301")] == [6, 4, 1]


def test_csv_gives_back_what_went_in():
    rows = [['with "quotes", commas', 1 / 3, 7], ["two\nlines", None, -1e-9]]
    text = csv_text(["name", "kld", "n"], rows)
    name, kld, n = list(csv.reader(io.StringIO(text)))[1]
    assert (name, float(kld), int(n)) == tuple(rows[0])
    assert list(csv.reader(io.StringIO(text)))[2] == ["two\nlines", "", "-1e-09"]


@pytest.mark.parametrize("table", [text_table, markdown_table, csv_text])
def test_a_short_row_is_refused(table):
    with pytest.raises(HalfbyteError, match="row 1: row has the wrong length"):
        table(["a", "b"], [[1, 2], [3]])


@pytest.mark.parametrize("align", ["l", "lx", "lll"])
def test_a_wrong_alignment_is_refused(align):
    with pytest.raises(HalfbyteError, match="alignment"):
        text_table(["a", "b"], [[1, 2]], align)
