"""The search of ggml types through the commands: sizes, fronts, resuming, reading the file back, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from halfbyte.targets.gguf_files.size import parse_size
from transformers import AutoModelForCausalLM

from halfbyte import cli, type_search
from halfbyte.calibration.imatrix_file import read_imatrix, write_imatrix
from halfbyte.core import files
from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import kl_per_token
from halfbyte.evaluate.simulation import become_types_, load_for_plan, load_types
from halfbyte.plan import load_plan
from tests.command_line import EVAL, changed, fails, search

TYPES = ["--spaces", "ggml"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
def test_transformers_reads_the_very_weights_that_were_searched(family, tiny_folder, here):
    folder = tiny_folder(family)
    assert search(folder, *TYPES, "--bpw", "5.5") == 0
    plan = load_plan("mixed_precision_config.pt")
    weights = sum(row["rows"] * row["columns"] for row in table())
    assert 0.9 * 5.5 < 8 * plan.file["nbytes"] / weights <= 5.5
    assert cli.run("export", ["--output", "m.gguf"]) == 0
    read = AutoModelForCausalLM.from_pretrained(".", gguf_file="m.gguf", dtype=torch.float32).eval()
    source = load_for_plan(plan, str(folder), device="cpu", dtype="fp32")
    become_types_(source, plan.tensors, load_types("mixed_precision_config.pt"))
    tokens = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = source.model(tokens).logits, read(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4 * float(ours.abs().max()))


def table():
    lines = Path("mixed_precision_config.types.csv").read_text().splitlines()
    keys = lines[0].split(",")
    rows = [dict(zip(keys, line.split(","), strict=True)) for line in lines[1:]]
    return [{**row, "rows": int(row["rows"]), "columns": int(row["columns"])} for row in rows]


def test_the_size_of_a_file_is_kept_to_the_byte(tiny_folder, here):
    folder = tiny_folder("qwen3")
    assert search(folder, *TYPES, "--like", "Q5_K_M") == 0
    assert cli.run("export", ["--output", "like.gguf"]) == 0
    size = Path("like.gguf").stat().st_size - 1000
    assert search(folder, *TYPES, "--size", str(size), "--force") == 0
    assert cli.run("export", ["--output", "size.gguf"]) == 0
    reached = Path("size.gguf").stat().st_size
    assert size - 0.03 * size < reached <= size


def test_a_plan_without_activation_bits(tiny_folder, here, capsys):
    assert search(tiny_folder("llama"), *TYPES) == 0
    capsys.readouterr()
    for policy in ("exact", "tiered"):
        match = "the plan has no activation bits"
        fails(capsys, cli.run("export", ["--policy", policy, "--output", "m.gguf"]), match=match)
    assert cli.run("simulate", [*EVAL, "--json", "s.json"]) == 0
    rows = {row["name"]: row["quality"]["kld_mean"] for row in json.loads(Path("s.json").read_text())["rows"]}
    assert set(rows) == {"original", "GGUF types"}
    config = ["--model_id", str(tiny_folder("llama")), "--config", "mixed_precision_config.pt"]
    assert cli.run("eval", [*config, *EVAL[:6], "--json", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["kld_mean"] == pytest.approx(rows["GGUF types"], rel=1e-3)


def test_a_plan_without_types_has_no_budget_policy(tiny_folder, here, capsys):
    assert search(tiny_folder("llama")) == 0
    capsys.readouterr()
    fails(capsys, cli.run("export", ["--policy", "budget", "--output", "m.gguf"]), match="the plan has no types")
    assert cli.run("export", ["--output", "m.gguf"]) == 0
    assert "policy tiered" in capsys.readouterr().out


def test_a_front_is_a_plan_for_every_size(tiny_folder, here, capsys):
    assert search(tiny_folder("llama"), *TYPES, "--pareto", "--output", "plan.json") == 0
    front = sorted(Path().glob("plan.Q*.json"))
    assert {"plan.Q4_K_M.json", "plan.Q5_K_M.json"} <= {path.name for path in front}
    sizes, losses = [], []
    for path in front:
        plan = load_plan(path)
        assert plan.file["nbytes"] <= plan.file["capacity"]
        assert plan.budget_reached == 1.0  # llama.cpp computes with 8-bit activations
        sizes.append(plan.file["nbytes"])
        losses.append(plan.file["losses"]["plan"])
        assert cli.run("export", ["--config", str(path), "--output", f"{path.stem}.gguf"]) == 0
    order = sorted(range(len(front)), key=sizes.__getitem__)
    assert [losses[at] for at in order] == sorted(losses, reverse=True)
    assert load_plan("plan.Q4_K_M.json").tensors == load_plan("plan.json").tensors
    assert Path("plan.types-front.png").stat().st_size > 1000
    for name in ("plan.json", "plan.types.safetensors", "plan.types.csv", "plan.types.json"):
        Path(name).unlink()
    fails(capsys, search(tiny_folder("llama"), *TYPES, "--pareto", "--output", "plan.json"), match="already exists")


@pytest.mark.parametrize("stopped_in", ["run_genetic", "validated"])
def test_resumed_in_the_same_plan(stopped_in, tiny_folder, here, monkeypatch, capsys):
    folder = tiny_folder("qwen2")
    assert search(folder, *TYPES, "--output", "whole.json") == 0

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type_search, stopped_in, interrupt)
        assert search(folder, *TYPES, "--output", "stopped.json") == 2
    assert search(folder, *TYPES, "--output", "stopped.json") == 2  # an interrupted search is waiting
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: files.shutil._ntuple_diskusage(1, 1, 1000))
    assert search(folder, *TYPES, "--output", "other.json") == 2
    assert "candidates: disk is too small" in capsys.readouterr().err
    assert search(folder, *TYPES, "--output", "stopped.json", "--resume") == 0  # what is there needs no more room
    whole, stopped = load_plan("whole.json"), load_plan("stopped.json")
    assert whole.hash == stopped.hash
    assert whole.file == stopped.file


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--size", "10kB"], "no room for weights"),
        (["--size", "300kB"], "capacity is below the smallest choices"),
        (["--bpw", "2"], "capacity is below the smallest choices"),
        (["--size", "4 apples"], "not a size"),
        (["--size", "1GB", "--bpw", "5"], "two budgets"),
        (["--bpw", "40"], "out of range"),
        (["--like", "Q4_K_XL"], "unknown file type"),
        (["--target", "sim"], "only a GGUF file has types"),
    ],
)
def test_what_is_refused_before_any_work(arguments, match, tiny_folder, here, capsys):
    fails(capsys, search(tiny_folder("llama"), *TYPES, *arguments), match=match)
    assert not list(here.iterdir())


def test_r1_is_refused_where_the_head_is_the_embedding(tiny_folder, here, capsys):
    match = "R1 would need a second vocabulary matrix"
    fails(capsys, search(tiny_folder("llama-tied"), *TYPES, "--transforms", "smooth,r1"), match=match)
    assert not list(here.iterdir())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_rotated_residual_stream_runs_in_llamacpp(family, tiny_folder, here, capsys):
    """With packed candidates: the file agrees with the simulation, and loses what the search said."""
    folder = tiny_folder(family)
    rotated = ["--transforms", "smooth,rotate", "--weights", "rtn", "--codes", "packed"]
    assert search(folder, *TYPES, *rotated, "--bpw", "6", "--output", "plan.json") == 0
    plan = load_plan("plan.json")
    assert plan.file["transforms"] == ["smooth", "r1", "r2"]
    assert cli.run("export", ["--config", "plan.json", "--output", "m.gguf", "--json", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["kl"] < 0.01
    read = AutoModelForCausalLM.from_pretrained(".", gguf_file="m.gguf", dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(64).unsqueeze(0)
    with torch.no_grad():
        kl = kl_per_token(*(model(tokens).logits[0].log_softmax(-1) for model in (original, read))).mean()
    assert float(kl) == pytest.approx(plan.file["losses"]["plan"], rel=0.5)


@pytest.mark.parametrize("flag", [["--size", "1GB"], ["--bpw", "5"], ["--imatrix", "x.gguf"]])
def test_flags_only_for_types(flag, tiny_folder, here, capsys):
    fails(capsys, search(tiny_folder("llama"), *flag), match="only for types of a GGUF file")


@pytest.mark.parametrize(
    ("text", "size"), [("123", 123), ("4.36GiB", int(4.36 * 2**30)), ("700 MB", 700_000_000), ("1.5kib", 1536)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3MB", "1e9", "3 XB"])
def test_no_sizes(text):
    with pytest.raises(HalfbyteError, match="not a size"):
        parse_size(text)


def test_scales_by_an_importance_matrix(tiny_folder, here, capsys, tmp_path_factory):
    """The model's own importance changes nothing; another one does, and that of another model is refused."""
    folder = str(tiny_folder("qwen2"))
    text = ["--device", "cpu", "--calib", "pydoc", "--ctx", "64", "--calib_tokens", "128"]
    assert cli.run("imatrix", ["--model_id", folder, *text, "--output", "own.gguf"]) == 0
    search_it = [*TYPES, "--transforms", "smooth", "--weights", "rtn"]
    assert search(folder, *search_it, "--output", "a.json") == 0
    assert search(folder, *search_it, "--output", "b.json", "--imatrix", "own.gguf") == 0
    a, b = load_plan("a.json"), load_plan("b.json")
    assert b.file["losses"]["plan"] == pytest.approx(a.file["losses"]["plan"], rel=0.02)
    other = read_imatrix("own.gguf")
    values = {name: np.geomspace(1, 1e4, value.size).astype(np.float32) for name, value in other.values.items()}
    write_imatrix("other.gguf", replace(other, values=values))
    assert search(folder, *search_it, "--output", "c.json", "--imatrix", "other.gguf") == 0
    assert load_plan("c.json").file["losses"]["plan"] > a.file["losses"]["plan"]
    assert load_plan("c.json").file["sha256"] != a.file["sha256"]
    capsys.readouterr()
    wrong = {name: value[:-1] for name, value in other.values.items()}
    write_imatrix("wrong.gguf", replace(other, values=wrong))
    match = "does not belong to this model"
    fails(capsys, search(folder, *TYPES, "--imatrix", "wrong.gguf", "--output", "d.json"), match=match)
    assert not Path(".d.json.work").exists()


@pytest.mark.parametrize("dead", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_dead_matrices_and_dead_inputs(dead, tiny_folder, here, tmp_path_factory):
    folder = changed(tiny_folder("llama"), tmp_path_factory, dead, factor=0)
    assert search(folder, *TYPES) == 0
    assert cli.run("export", ["--output", "m.gguf"]) == 0


def test_values_that_no_type_holds(tiny_folder, here, tmp_path_factory, capsys):
    folder = changed(tiny_folder("llama"), tmp_path_factory, "model.layers.1.mlp.gate_proj.weight", factor=1e25)
    fails(capsys, search(folder, *TYPES, "--transforms", "none"), match="layers.1.mlp.gate_proj: values do not fit")
