"""What the export policies write, and what llama.cpp makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import sha256
from halfbyte.models.gguf_source import pairs_from_halves
from halfbyte.models.loading import find, load
from halfbyte.models.modules import linear
from halfbyte.options import ExportOptions
from halfbyte.plan import codes_path, load_codes, load_plan, save_codes, save_plan
from halfbyte.prepare.folding import TransformedBlocks
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.ggml.types import encode
from halfbyte.targets.gguf_files import export as exporting
from halfbyte.targets.gguf_files.export import export_gguf
from tests.targets.plans import PLAN, plan_for
from tests.tiny_models import kl_of_llamacpp, logits_of, some_ids

MOSTLY_A8 = (8, 8, 8, 4)
CLEARLY = 0.5  # a tiered file's KL over an exact one's, where three of four units are A8


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(policy, **more):
    return export_gguf(ExportOptions(config=PLAN, output=f"{policy}.gguf", policy=policy, **more))


def original(folder):
    return load(find(str(folder)), device=torch.device("cpu"), dtype=torch.float32)


def test_tiered_is_nearer_to_the_original_than_exact(tiny_folder, here):
    folder = tiny_folder("qwen2")
    plan_for(folder, target="gguf", a_bits=MOSTLY_A8)
    source = original(folder)
    ids = some_ids(source)
    reference = logits_of(source.model, ids)
    kl = {}
    for policy in ("tiered", "exact"):
        assert export(policy).policy == policy
        kl[policy] = kl_of_llamacpp(Path(f"{policy}.gguf"), ids, reference)
    assert kl["tiered"] < CLEARLY * kl["exact"], kl


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
def test_tiered_holds_the_original_weights_and_the_codes(family, tiny_folder, here):
    """The default of a plan without types; q and k of Llama in llama.cpp's order."""
    folder = tiny_folder(family)
    _, plan = plan_for(folder, target="gguf")
    result = export("auto")
    assert (result.policy, result.exact) == ("tiered", sum(entry.a_bits == 4 for entry in plan.layers.values()))
    assert result.kl < 1e-3
    export("exact")
    files = [{tensor.name: tensor for tensor in GGUFReader(f"{name}.gguf").tensors} for name in ("auto", "exact")]
    source, codes = original(folder), load_codes(codes_path(PLAN))
    weights = TransformedBlocks(source, Recipe(plan.transforms, plan.weights), codes.channel_scales, where=PLAN)
    for name, entry in plan.layers.items():
        tiered, exact = (file[source.family.gguf_name(f"{name}.weight")] for file in files)
        if entry.a_bits == 4:
            assert tiered.tensor_type.name == "Q4_0"
            assert np.array_equal(tiered.data, exact.data)
            continue
        assert tiered.tensor_type.name == "Q8_0"
        heads = {"q_proj": source.config.num_attention_heads, "k_proj": source.config.num_key_value_heads}
        weight = weights.weight(name)
        if source.family.interleaved_rope and name.rpartition(".")[2] in heads:
            weight = pairs_from_halves(weight, heads[name.rpartition(".")[2]])
        assert np.array_equal(tiered.data, encode(weight, "Q8_0").reshape(tiered.data.shape)), name


def test_the_simulation_holds_what_the_file_holds(tiny_folder, here, monkeypatch):
    """Its weights are neither the codes' nor the original's where a layer is A8."""
    folder = tiny_folder("qwen2")
    _, plan = plan_for(folder, target="gguf")
    seen = {}

    def keep(source, engine, path):
        seen.update({name: linear(source.model, name) for name in plan.layers})
        return 0.0, 1.0

    monkeypatch.setattr(exporting, "compare_engines", keep)
    export("tiered")
    theirs = original(Path("tiered.gguf"))
    for name in plan.layers:
        assert seen[name].a_bits == 8
        assert torch.equal(seen[name].weight, linear(theirs.model, name).weight), name


def test_a_plan_without_a8_layers_is_exact(tiny_folder, here):
    plan_for(tiny_folder("qwen2"), target="gguf", a_bits=(4,))
    assert [export(policy).policy for policy in ("tiered", "exact", "auto")] == ["exact"] * 3
    assert Path("tiered.gguf").read_bytes() == Path("exact.gguf").read_bytes() == Path("auto.gguf").read_bytes()


def test_plans_that_have_not_what_a_policy_writes(tiny_folder, here):
    """Codes files of older versions have no channel scales; a checkpoint's codes are not of our weights."""
    plan_for(tiny_folder("llama"), target="gguf", weights="rtn")
    with pytest.raises(HalfbyteError, match="the plan has no types; search with --spaces types"):
        export("budget")
    codes = load_codes(codes_path(PLAN))
    codes.channel_scales.clear()
    codes_path(PLAN).unlink()
    save_codes(codes_path(PLAN), codes)
    plan = replace(load_plan(PLAN, with_codes=False), codes_sha256=sha256(codes_path(PLAN)))
    save_plan(PLAN, plan)
    with pytest.raises(HalfbyteError, match="no channel scales"):
        export("auto")
    save_plan(PLAN, replace(plan, weights="from there", transforms=()))
    with pytest.raises(HalfbyteError, match="got codes from there; use --policy exact"):
        export("tiered")
    assert export("auto").policy == "exact"
