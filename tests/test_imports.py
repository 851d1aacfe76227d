"""The architecture: imports go down one list of folders and in no circle, and nothing below the command line prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "halfbyte"
# Lowest first. A module imports from its own tier or from a lower one.
TIERS = [
    ("core",),
    ("arguments", "options"),
    ("models", "quant"),
    ("plan", "workdir"),
    ("calibration",),
    ("search",),
    ("transforms",),
    ("prepare",),
    ("engines",),
    ("evaluate",),
    ("report",),
    ("targets",),
    ("menus",),
    ("pipeline",),
    ("api",),
    ("cli", "__main__", "__init__"),
]
TIER = {name: index for index, names in enumerate(TIERS) for name in names}
# (module, what it needs of a higher tier): why. Nothing else may look up, and what is no longer true has to go.
UPWARD = {
    ("options", "transforms"): "names of the transforms, for --help",
    ("evaluate.measure_original", "targets"): "the original is written as a GGUF file before its speed is measured",
}
ROOT = {"__init__", "__main__", "api", "arguments", "cli", "options", "pipeline", "plan", "workdir"}
NUMBERS = ("problem", "genetic", "validate", "run")  # the search itself
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def top(module: str) -> str:
    return module.partition(".")[0]


def for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: list[ast.stmt], *, inside_functions: bool) -> Iterator[ast.stmt]:
    """All statements that may run, one by one; those of functions only if they are asked for."""
    for node in body:
        yield node
        if for_types_only(node):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, part, []), inside_functions=inside_functions)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, inside_functions=inside_functions)


def imported(module: str, *, inside_functions: bool) -> set[str]:
    """The modules of the package that ``module`` imports, but for the package itself, which has the version."""
    found = set()
    for node in statements(tree(module).body, inside_functions=inside_functions):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "halfbyte":
            parent = str(node.module).removeprefix("halfbyte").removeprefix(".")
            names = [f"{parent}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in MODULES else parent for name in names}
        elif isinstance(node, ast.Import):
            names = [alias.name.partition(".") for alias in node.names]
            found |= {rest for package, _, rest in names if package == "halfbyte"}
    return found - {"", module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for other in imported(module, inside_functions=True):
        if (module, top(other)) not in UPWARD:
            assert TIER[top(other)] <= TIER[top(module)], f"{module} imports {other}"


def test_every_exception_is_needed():
    for module, above in UPWARD:
        assert above in {top(other) for other in imported(module, inside_functions=True)}, (module, above)
        assert TIER[above] > TIER[top(module)], (module, above)


def test_no_circle():
    """What is imported when a module is; a circle through functions is slow to understand, not wrong."""
    graph = {module: imported(module, inside_functions=False) for module in MODULES if module != "__init__"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' → '.join(error.args[1])}")


def test_nothing_lies_loose_at_the_root():
    assert {path.stem for path in SOURCE.glob("*.py")} == ROOT
    assert {top(module) for module in MODULES} - ROOT == set(TIER) - ROOT


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cli"])
def test_only_the_command_line_prints(module):
    calls = [node.func for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)]


@pytest.mark.parametrize("name", NUMBERS)
def test_the_search_sees_numbers_not_torch(name):
    nodes = list(ast.walk(tree(f"search.{name}")))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in found} & {"torch", "transformers"}


def test_workers_stay_small():
    """The GGUF worker's peak memory is the model's, and --help is quick: neither may load torch."""
    code = "import sys, halfbyte, halfbyte.cli, halfbyte.evaluate.measure_gguf; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
