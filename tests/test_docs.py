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
README_LINES = 150
DOCUMENTS = [f"docs/{name}.md" for name in ("architecture", "methods", "results", "hardware", "serving", "faq")]
ITEMS = [item for options, _, _ in COMMANDS.values() for item in fields(options)]
FLAGS = {item.name for item in ITEMS} | {item.metadata["alias"] for item in ITEMS if item.metadata["alias"]}


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


@pytest.mark.parametrize("name", [*READMES, *DOCUMENTS])
def test_every_flag_of_a_benchmark_exists(name):
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\s+python (benchmarks/\w+\.py)(.*)", line):
            files = (ROOT / match[1], ROOT / "benchmarks" / "common.py")  # the second has flags that most share
            script = "".join(file.read_text(encoding="utf-8") for file in files)
            for flag in re.findall(r"--[a-z0-9_]+", match[2].partition(" -- ")[0]):
                assert f'"{flag}"' in script, line


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", *DOCUMENTS])
def test_links_inside_the_repository_work(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if "://" not in target:
            path = (ROOT / name).parent / target if target else ROOT / name
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("name", [*READMES, *DOCUMENTS])
def test_scripts_in_the_documents_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for script in set(re.findall(r"python ([\w/]+\.py)", text)):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_both_readmes_have_the_same_shape():
    english, chinese = (shape((ROOT / name).read_text(encoding="utf-8")) for name in READMES)
    for part, found in english.items():
        assert found == chinese[part], part


def test_measured_tables_are_the_same_in_both_readmes():
    english, chinese = (measured((ROOT / name).read_text(encoding="utf-8")) for name in READMES)
    assert english == chinese


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shape(text: str) -> dict[str, list]:
    """What does not depend on the language: levels of headings, code without comments, sizes of tables, links."""
    lines = text.splitlines()
    code = [line.partition("  #")[0].rstrip() for line in lines if line.startswith("    ")]
    fenced = [block.strip() for block in re.findall(r"```.*?```", text, flags=re.S)]
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    return {
        "headings": [line.split()[0] for line in lines if re.match(r"#+ ", line)],
        "code": code + fenced,
        "tables": [(len(table.splitlines()), table.splitlines()[1].count("|")) for table in tables],
        "flags": sorted(set(re.findall(r"--[a-z0-9_]+", text))),
        "images": re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text),
        "documents": sorted(set(re.findall(r"\]\(([^):]*\.md)\)", text)) - set(READMES)),
    }


def measured(text: str) -> dict[str, str]:
    """The tables between markers, by name; the headline is a sentence."""
    found = re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", text, flags=re.S)
    return {name: table for name, table in found if name != "headline"}
