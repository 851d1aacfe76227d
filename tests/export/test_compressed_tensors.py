"""Folders in the compressed-tensors format: transformers loads them unpatched and says what the simulation says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halfbyte import cli
from halfbyte.export.plan_file import codes_path, load_codes, load_plan
from halfbyte.exporting_vllm import logits_in_transformers
from halfbyte.models.loading import find, load
from halfbyte.models.surgery import set_activation_bits_
from halfbyte.simulation import become_simulation_, plan_bits
from tests.command_line import search
from tests.tiny_models import logits_of, some_ids

PLAN = "mixed_precision_config.pt"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def searched(folder, *more):
    return search(folder, "--target", "vllm", *more)


def simulated(folder, ids):
    """fp32 logits of the plan in our simulation, loaded anew."""
    source = load(find(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    plan = load_plan(PLAN)
    become_simulation_(source, load_codes(codes_path(PLAN)), plan.layers, plan.transforms)
    set_activation_bits_(source.model, plan_bits(plan))
    return source, logits_of(source.model, ids)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", ()),
        ("qwen2", ("--online_transforms",)),
        ("qwen2-tied", ("--transforms", "smooth,r1,r2", "--group_size", "32")),
        ("llama-tied", ("--weights", "rtn")),
    ],
)
def test_transformers_says_what_the_simulation_says(family, more, tiny_folder, here, tiny):
    folder = tiny_folder(family)
    assert searched(folder, *more) == 0
    assert cli.run("export vllm", ["--output", "out", "--json", "e.json"]) == 0
    made = json.loads(Path("e.json").read_text())
    assert made["difference"] <= 1e-4
    ids = some_ids(tiny(family))
    _, ours = simulated(folder, ids)
    theirs = logits_in_transformers(Path("out"), ids[None])[0]
    assert float((ours - theirs).abs().max() / ours.abs().max()) <= 1e-4
    plan = load_plan(PLAN)
    assert {entry.a_bits for entry in plan.layers.values()} == {4, 8}
