"""Everything that is said in the language of the reader is in the catalogue, with the same values."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from string import Formatter

import pytest

from halfbyte.core.language import CATALOGUES, own_language, say, speaking

SOURCE = Path(__file__).parent.parent / "src" / "halfbyte"
IN_A_TEMPLATE = re.compile(r"""say\((["'])(.*?)\1""")
CATALOGUE = json.loads((CATALOGUES / "zh.json").read_text(encoding="utf-8"))


def literals(node: ast.expr, module: str) -> set[str]:
    """The texts that an argument of ``say`` can be: a literal, one of two, or constants of its module."""
    if isinstance(node, ast.Constant):
        return {node.value}
    if isinstance(node, ast.IfExp):
        return literals(node.body, module) | literals(node.orelse, module)
    assert isinstance(node, ast.Name), ast.unparse(node)
    found = getattr(importlib.import_module(module), node.id)
    return {found} if isinstance(found, str) else set(found)


def said() -> set[str]:
    """The English texts of the code and of the template of the page."""
    found = set()
    for path in SOURCE.rglob("*.jinja"):
        found |= {match[1] for match in IN_A_TEMPLATE.findall(path.read_text(encoding="utf-8"))}
    for path in SOURCE.rglob("*.py"):
        module = ".".join(("halfbyte", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "say":
                found |= literals(node.args[0], module)
            elif node.func.id == "map" and isinstance(node.args[0], ast.Name) and node.args[0].id == "say":
                found |= literals(node.args[1], module)
    return found


def test_the_catalogue_has_every_text_and_no_other():
    assert set(CATALOGUE) == said()


@pytest.mark.parametrize("text", CATALOGUE)
def test_a_translation_has_the_same_values(text):
    def values(template: str) -> set[str | None]:
        return {name for _, name, _, _ in Formatter().parse(template) if name}

    assert values(CATALOGUE[text]) == values(text)


def test_the_language_of_the_locale(monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert own_language() == "en"
    for name, value, language in (
        ("LANG", "zh_CN.UTF-8", "zh"),
        ("LC_MESSAGES", "xx", "en"),
        ("LC_ALL", "zh-Hans", "zh"),
    ):
        monkeypatch.setenv(name, value)
        assert own_language() == language
    with speaking("auto"):
        assert say("plan") == "方案"
    assert say("plan") == "plan"
