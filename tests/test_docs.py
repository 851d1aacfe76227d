"""What the documents promise is what the code does."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from halfbyte.cli import COMMANDS

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
FLAGS = {item.name for options, _ in COMMANDS.values() for item in fields(options)}


def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_option_tables_are_current():
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == generate().option_tables()


@pytest.mark.parametrize("name", READMES)
def test_every_flag_in_the_readme_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    others = ("pip ", "hf ", "python benchmarks/")
    ours = [line for line in text.splitlines() if not line.lstrip("- ").startswith(others)]
    used = set(re.findall(r"--([a-z0-9_]+)\b", "\n".join(ours)))
    assert used - FLAGS <= {"index", "no", "nproc"}  # of pip and torchrun: --index-url, --no-deps, --nproc-per-node
    assert {"ga_pop", "ga_gen", "target_compression", "skip_original", "q4km_path", "mixed_path", "max_tokens"} <= used


@pytest.mark.parametrize("name", READMES)
def test_every_flag_of_a_benchmark_exists(name):
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\s+python (benchmarks/\w+\.py)(.*)", line):
            files = (ROOT / match[1], ROOT / "benchmarks" / "common.py")  # the second has flags that most share
            script = "".join(file.read_text(encoding="utf-8") for file in files)
            for flag in re.findall(r"--[a-z0-9_]+", match[2]):
                assert f'"{flag}"' in script, line


@pytest.mark.parametrize(
    "name", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/numbers.md", "docs/serving.md"]
)
def test_links_inside_the_repository_work(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", READMES)
def test_scripts_in_the_readme_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for script in set(re.findall(r"python ([\w/]+\.py)", text)):
        assert (ROOT / script).exists(), script
