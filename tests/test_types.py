"""The search of ggml types: it keeps to the size, what was searched is what is exported, fronts, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.arguments import parse_size
from halfbyte.calibration.imatrix import make_imatrix
from halfbyte.calibration.imatrix_file import read_imatrix, write_imatrix
from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.evaluate import evaluate
from halfbyte.evaluate.quality import kl_per_token
from halfbyte.evaluate.simulate import simulate
from halfbyte.options import EvalOptions, ExportOptions, ImatrixOptions, SimulateOptions
from halfbyte.plan import load_plan
from halfbyte.prepare.simulation import become_types_, load_for_plan, load_types
from halfbyte.targets.gguf_files.export import export_gguf
from tests.command_line import changed
from tests.searches import SMALLEST, run

QUICK = {"spaces": "types", "weights": "rtn", "transforms": "none"}  # where neither matters
SCORED = {"text": "pydoc", "ctx": 64, "chunks": 2, "device": "cpu"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def searched(tiny_folder, tmp_path_factory):
    """A folder with a plan that has types only: ``plan.json``."""
    folder = tmp_path_factory.mktemp("types")
    run(tiny_folder("llama"), folder / "plan.json", "gguf", **QUICK)
    return folder


def export(plan: Path, **more):
    return export_gguf(ExportOptions(config=str(plan), output=str(plan.with_suffix(".gguf")), **more))


def read_back(plan: Path):
    """The exported model as transformers reads it."""
    file = plan.with_suffix(".gguf").name
    return AutoModelForCausalLM.from_pretrained(plan.parent, gguf_file=file, dtype=torch.float32).eval()


@pytest.mark.parametrize(("family", "transforms"), [("llama", "smooth,rotate"), ("qwen2-tied", "auto")])
def test_transformers_reads_the_very_weights_that_were_searched(family, transforms, tiny_folder, here):
    folder, path = tiny_folder(family), here / "plan.json"
    found = run(folder, path, "gguf", spaces="types", transforms=transforms, bpw=5.5).found["types"]
    plan = load_plan(path)
    assert found.cost == plan.file["nbytes"] <= plan.file["capacity"] == found.budget
    source = load_for_plan(plan, str(folder), device="cpu", dtype="fp32")
    weights = sum(source.model.get_submodule(name).weight.numel() for name in plan.tensors)
    assert 0.9 * 5.5 < 8 * found.cost / weights <= 5.5
    export(path)
    become_types_(source, plan.tensors, load_types(path))
    tokens, read = torch.arange(32).unsqueeze(0), read_back(path)
    with torch.no_grad():
        ours, theirs = source.model(tokens).logits, read(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4 * float(ours.abs().max()))


def test_the_size_of_a_file_is_kept_to_the_byte(tiny_folder, here):
    folder = tiny_folder("qwen3")
    run(folder, here / "ftype.json", "gguf", **QUICK, ftype="Q5_K_M")
    size = export(here / "ftype.json", check=False).path.stat().st_size - 1000
    run(folder, here / "size.json", "gguf", **QUICK, size=str(size))
    reached = export(here / "size.json", check=False).path.stat().st_size
    assert size - 0.03 * size < reached <= size


def test_a_plan_without_activation_bits(searched, tiny_folder):
    path = searched / "plan.json"
    for policy in ("exact", "tiered"):
        with pytest.raises(HalfbyteError, match="the plan has no activation bits"):
            export(path, policy=policy)
    assert load_plan(path).budget_reached == 1.0  # llama.cpp computes with 8-bit activations
    rows = simulate(SimulateOptions(config=str(path), max_tokens=4, **SCORED)).rows
    losses = {row.name: row.quality.kld_mean for row in rows}
    assert losses.keys() == {"original", "GGUF types"}
    model = load_plan(path).model_id
    scored = evaluate(EvalOptions(model_id=model, config=str(path), **SCORED))
    assert scored.quality.kld_mean == pytest.approx(losses["GGUF types"], rel=1e-3)


def test_a_plan_without_types(tiny_folder, here):
    path = here / "plan.json"
    run(tiny_folder("llama"), path, "gguf", **{**QUICK, "spaces": "activations"})
    with pytest.raises(HalfbyteError, match="the plan has no types"):
        export(path, policy="budget")
    assert export(path).policy == "tiered"


def test_a_front_is_a_plan_for_every_size(tiny_folder, here):
    result = run(tiny_folder("llama"), here / "plan.json", "gguf", **QUICK, pareto=True, ga_gen=6)
    front = result.found["types"].front
    assert {"Q4_K_M", "Q5_K_M"} <= front.keys()
    assert {path.name for path in here.glob("plan.*Q*.json")} == {f"plan.{ftype}.json" for ftype in front}
    plans = [load_plan(here / f"plan.{ftype}.json") for ftype in front]
    for ftype, plan in zip(front, plans, strict=True):
        assert plan.file["nbytes"] == front[ftype].cost <= plan.file["capacity"]
        assert plan.tensors == front[ftype].choice
    by_size = sorted(plans, key=lambda plan: plan.file["nbytes"])
    losses = [plan.file["validation"]["plan"] for plan in by_size]
    assert losses == sorted(losses, reverse=True)
    assert load_plan(here / "plan.Q4_K_M.json").tensors == load_plan(here / "plan.json").tensors
    assert (here / "plan.types-front.png").stat().st_size > 1000
    assert export(here / "plan.Q5_K_M.json").kl < 0.01
    for name in ("plan.json", "plan.types.safetensors", "plan.types.csv", "plan.types.json"):
        (here / name).unlink()
    with pytest.raises(HalfbyteError, match="already exists"):
        run(tiny_folder("llama"), here / "plan.json", "gguf", **QUICK, pareto=True)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"size": "10kB"}, "no room for weights"),
        ({"size": "300kB"}, "the matrices do not fit, expected at least"),
        ({"bpw": 2}, "the matrices do not fit"),
        ({"size": "4 apples"}, "not a size"),
        ({"size": "1GB", "bpw": 5}, "one excludes the other"),
        ({"size": "1GB", "ftype": "Q5_K_M"}, "one excludes the other"),
        ({"bpw": 5, "ftype": "Q5_K_M"}, "one excludes the other"),
        ({"bpw": 40}, "out of range"),
        ({"ftype": "Q4_K_XL"}, "unknown file type"),
        ({"target": "sim"}, "the target sim does not have this"),
        ({"spaces": "activations", "size": "1GB"}, "--size: only for types of a GGUF file"),
        ({"spaces": "activations", "imatrix": "x.gguf"}, "--imatrix: only for types of a GGUF file"),
        ({"family": "llama-tied", "transforms": "smooth,r1"}, "R1 would need a second vocabulary matrix"),
    ],
)
def test_what_is_refused_before_any_work(more, match, tiny_folder, here):
    given = {"target": "gguf", "family": "llama", **QUICK, **more}
    with pytest.raises(HalfbyteError, match=match):
        run(tiny_folder(given.pop("family")), here / "plan.json", **given)
    assert not list(here.iterdir())


def test_a_rotated_residual_stream_runs_in_llamacpp(tiny_folder, here):
    """With packed candidates: the file agrees with the simulation, and loses what the search said."""
    folder, path = tiny_folder("qwen2"), here / "plan.json"
    more = {"spaces": "types", "transforms": "smooth,rotate", "weights": "rtn", "codes": "packed", "bpw": 6}
    plan = run(folder, path, "gguf", **more, search_tokens=256).plan
    assert plan.file["transforms"] == ["smooth", "r1", "r2"]
    assert export(path).kl < 0.01
    read, original = read_back(path), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(64).unsqueeze(0)
    with torch.no_grad():
        kl = kl_per_token(*(model(tokens).logits[0].log_softmax(-1) for model in (original, read))).mean()
    assert float(kl) == pytest.approx(plan.file["validation"]["plan"], rel=0.5)


def test_scales_by_an_importance_matrix(tiny_folder, here):
    """The model's own importance changes nothing; another one does, and that of another model is refused."""
    folder = tiny_folder("qwen2")
    text = {name: SMALLEST[name] for name in ("calib", "ctx", "calib_tokens")}
    make_imatrix(ImatrixOptions(model_id=str(folder), output="own.gguf", device="cpu", **text))
    more = {**QUICK, "transforms": "smooth"}
    own = read_imatrix("own.gguf")
    values = {name: np.geomspace(1, 1e4, value.size).astype(np.float32) for name, value in own.values.items()}
    write_imatrix("other.gguf", replace(own, values=values))
    plans = [
        run(folder, here / f"{name}.json", "gguf", **more, imatrix=imatrix).plan
        for name, imatrix in (("a", None), ("b", "own.gguf"), ("c", "other.gguf"))
    ]
    losses = [plan.file["validation"]["plan"] for plan in plans]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] > losses[0]
    assert plans[2].file["sha256"] != plans[0].file["sha256"]
    write_imatrix("wrong.gguf", replace(own, values={name: value[:-1] for name, value in own.values.items()}))
    with pytest.raises(HalfbyteError, match="does not belong to this model"):
        run(folder, here / "d.json", "gguf", **QUICK, imatrix="wrong.gguf")
    assert not Path(".d.json.work").exists()


def test_dead_matrices_and_dead_inputs(tiny_folder, here, tmp_path_factory):
    dead = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")
    run(changed(tiny_folder("llama"), tmp_path_factory, *dead, factor=0), here / "plan.json", "gguf", spaces="types")
    export(here / "plan.json")


def test_values_that_no_type_holds(tiny_folder, here, tmp_path_factory):
    folder = changed(tiny_folder("llama"), tmp_path_factory, "model.layers.1.mlp.gate_proj.weight", factor=1e25)
    with pytest.raises(HalfbyteError, match=r"layers\.1\.mlp\.gate_proj: values do not fit"):
        run(folder, here / "plan.json", "gguf", **QUICK)
    assert not (here / "plan.json").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("123", 123), ("4.36GiB", int(4.36 * 2**30)), ("700 MB", 700_000_000), ("1.5kib", 1536)]
)
def test_sizes(text, size):
    assert parse_size(text, "--size") == size


@pytest.mark.parametrize("text", ["", "GB", "-3MB", "1e9", "3 XB"])
def test_no_sizes(text):
    with pytest.raises(HalfbyteError, match="not a size"):
        parse_size(text, "--size")
