"""The architecture: imports go down one list of layers, and nothing below the command line prints."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "halfbyte"
# Lowest first. A module imports from its own tier or from a lower one.
TIERS = [
    ("errors", "progress", "files", "hub", "host", "options", "naming", "spec", "parallel", "__init__"),
    ("numerics",),
    ("kernels", "formats"),
    ("weights", "transforms"),
    ("models",),
    ("calibration",),
    ("search", "export", "runtime", "serving"),
    ("evaluate", "report"),
    (
        "provenance",
        "stages",
        "prepare",
        "results",
        "allocation",
        "simulation",
        "exporting",
        "exporting_vllm",
        "evaluating",
        "doctor",
        "search_checks",
        "pipeline",
        "type_search",
        "importance_file",
    ),
    ("drawing", "commands", "cli"),
]
TIER = {name: index for index, names in enumerate(TIERS) for name in names}
# What a module really needs of a higher tier, and why it is right.
ALLOWED = {
    ("transforms", "models"): "a transform is written against a family's description",
}
# The algorithms of the search.
SEARCH = (
    "space",
    "problem",
    "menu",
    "knapsack",
    "priced",
    "baselines",
    "asktell",
    "genetic",
    "surrogate",
    "evolution",
    "racing",
)
MODULES = sorted(SOURCE.rglob("*.py"))


def top(module: Path) -> str:
    return module.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "halfbyte":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in TIER}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("halfbyte.")}
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(module):
    here = top(module)
    assert here in TIER, f"{here} is in no tier"
    for other in imported(ast.parse(module.read_text(encoding="utf-8"))):
        if other == here or (here, other) in ALLOWED:
            continue
        assert TIER[other] <= TIER[here], f"{here} imports {other}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_the_command_line_prints(module):
    if top(module) in ("cli", "drawing"):
        return
    tree = ast.parse(module.read_text(encoding="utf-8"))
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls


def test_the_search_sees_numbers_not_torch():
    for name in SEARCH:
        tree = ast.parse((SOURCE / "search" / f"{name}.py").read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "torch" not in {module.partition(".")[0] for module in modules}


def test_workers_stay_small():
    """The GGUF worker's peak memory is the model's: it must not load torch."""
    import subprocess
    import sys

    code = "import halfbyte.evaluate.measure_gguf, sys; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
