"""Every message that a user can meet, collected from the code: each says where, then what, in one way of writing.

python -m pytest -s tests/test_messages.py -k reads    # shows the list
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "halfbyte"
VALUE = "…"  # stands for a value


def text_of(node: ast.expr | None) -> str:
    """A string or an f-string, with … for its values; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    return ""


def messages() -> dict[str, str]:
    """Place in the code -> message and what to do, of every :class:`HalfbyteError` that is made."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "HalfbyteError":
                fix = next((text_of(word.value) for word in node.keywords if word.arg == "fix"), "")
                text = text_of(node.args[0]) if node.args else ""
                if text:
                    found[f"{path.relative_to(SOURCE)}:{node.lineno}"] = f"{text}{fix and '; '}{fix}"
    return found


FOUND = messages()


def test_the_list_reads_well():
    assert len(FOUND) > 150
    print()
    for place, text in FOUND.items():
        print(f"{place}: {text}")


@pytest.mark.parametrize("part", sorted({place.partition("/")[0] for place in FOUND}))
def test_messages_are_written_in_one_way(part):
    for place, text in FOUND.items():
        if place.startswith(part):
            check(text)


def check(text):
    assert re.match(r"[^:;]{1,60}: ", text), text
    assert "\n" not in text, text
    assert "  " not in text, text
    assert not text.endswith((".", "!")), text
    assert len(text) < 320, text
    assert not re.search(r"\b(invalid|illegal|bad|oops|sorry|please|failed to)\b", text, re.IGNORECASE), text
