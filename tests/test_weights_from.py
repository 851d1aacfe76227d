"""A search that starts from a quantised checkpoint: its codes, to the last bit, in the plan and in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize

from halfbyte import cli, menus, pipeline
from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import kl_per_token
from halfbyte.menus import activations
from halfbyte.models.families import family_of
from halfbyte.models.gguf_source import halves_from_pairs
from halfbyte.plan import codes_path, load_codes, load_plan
from halfbyte.prepare.simulation import become_simulation_, load_for_plan, plan_bits
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.report import search_reports
from tests.command_line import GA, QUICK, fails
from tests.folding import fold_, logits
from tests.quantised_folders import Checkpoint, compressed, compressed_config, edited, gptq, gptq_config, scheme

PLAN = "mixed_precision_config.pt"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for picture in ("convergence_plot", "sensitivity_heatmap"):  # they take as long as a search
        monkeypatch.setattr(search_reports, picture, lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "write_page", lambda page, *_: page)
    return tmp_path


def search(folder, checkpoint, *more):
    return cli.run("search", ["--model_id", str(folder), *QUICK, *GA, "--weights_from", str(checkpoint), *more])


def test_gptq_to_gguf(tiny_folder, here, capsys):
    """The file holds the checkpoint's codes, and llama.cpp agrees with the simulation."""
    folder = tiny_folder("llama")
    made = Checkpoint(folder, group_size=64)
    made.write(here / "ours-GPTQ", gptq(), gptq_config(64))
    assert search(folder, "ours-GPTQ", "--verbose") == 0
    assert "14 layers: group 64: as in ours-GPTQ, not 128" in capsys.readouterr().out
    plan, codes = load_plan(PLAN), load_codes(codes_path(PLAN))
    assert plan.weights == "from ours-GPTQ"
    assert (plan.tensors, plan.transforms) == ({}, ())
    assert {entry.a_bits for entry in plan.layers.values()} == {4, 8}
    assert {entry.group_size for entry in plan.layers.values()} == {64}
    about = plan.search["weights_from"]
    assert (about["name"], about["format"], about["parameters"]) == ("ours-GPTQ", "gptq", 0)
    assert len(about["sha256"]) == 64
    outcome = Path("mixed_precision_config.outcome.csv").read_text()
    assert outcome.count("W4 g128,W4 g64") == outcome.count("as in ours-GPTQ") == 14
    assert cli.run("export", ["--output", "m.gguf"]) == 0
    assert "14 matrices hold exactly what was searched" in capsys.readouterr().out
    tensors = {tensor.name: tensor for tensor in GGUFReader("m.gguf").tensors}
    source = load_for_plan(plan, None, device="cpu", dtype="fp32")
    for layer in made.layers():
        tensor = tensors[source.family.gguf_name(f"{layer}.weight")]
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q_proj": 4, "k_proj": 2}.get(layer.rpartition(".")[2])
        values = halves_from_pairs(values, heads) if heads else values
        assert torch.equal(values, made.decoded(layer)), layer
        assert torch.equal(codes.weights[layer].decode(), made.decoded(layer)), layer


def test_a_folded_checkpoint_with_activations(tiny_folder, here, capsys):
    """Norms, biases, embedding and head come from it too; its own A8 and A4 do not."""
    folder = tiny_folder("qwen2-tied")
    made = Checkpoint(folder)
    with torch.no_grad():
        fold_(made.model, family_of("qwen2"), "r1,r2,smooth")
    made.model.config.tie_word_embeddings = False
    made.write(here / "W4A8", compressed, compressed_config(scheme(8), scheme(4)))
    assert search(folder, "W4A8") == 0
    plan = load_plan(PLAN)
    parameters = load_codes(codes_path(PLAN)).parameters
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < set(parameters)
    source = load_for_plan(plan, None, device="cpu", dtype="fp32")
    before = logits(source.model)
    become_simulation_(source, load_codes(codes_path(PLAN)), plan.layers)
    for name, value in source.model.named_parameters():
        layer = name.removesuffix(".weight")
        expected = made.decoded(layer) if layer in made.codes else made.model.get_parameter(name)
        assert torch.equal(value, expected), name
    for bits, label in ((dict.fromkeys(plan.layers, 8), "all A8"), (plan_bits(plan), "plan")):
        set_activation_bits_(source.model, bits)
        direct = float(kl_per_token(before, logits(source.model)).mean())  # on other text
        assert plan.search["scores"][label] == pytest.approx(direct, rel=0.5)
    capsys.readouterr()
    assert cli.run("export", ["--output", "m.gguf", "--json", "export.json"]) == 0
    assert json.loads(Path("export.json").read_text())["kl"] < 0.05
    assert "14 matrices hold exactly what was searched" in capsys.readouterr().out
    assert "output.weight" in {tensor.name for tensor in GGUFReader("m.gguf").tensors}


def test_for_the_simulation_and_resumed(tiny_folder, here, capsys, monkeypatch):
    """Groups that GGUF could not hold, symmetric activations, and one choice per layer."""
    folder = tiny_folder("qwen3")
    made = Checkpoint(folder, group_size=16)
    shards = made.write(here / "m", gptq(2), gptq_config(16, checkpoint_format="gptq_v2")) / "model.safetensors"
    arguments = ["--target", "sim", "--symmetric", "--granularity", "layer", "--fitness", "fisher"]

    def stopped(*_, **__):
        raise HalfbyteError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(menus, "search_menu", stopped)
        fails(capsys, search(folder, "m", *arguments), match="stopped")
    known = shards.read_bytes()
    edited(here / "m", lambda tensors: tensors["model.norm.weight"].mul_(2))
    fails(capsys, search(folder, "m", *arguments, "--resume"), match="the interrupted search had other settings")
    shards.write_bytes(known)
    monkeypatch.setattr(activations, "prepare_", stopped)
    assert search(folder, "m", *arguments, "--resume") == 0
    plan, codes = load_plan(PLAN), load_codes(codes_path(PLAN))
    assert all(entry.a_symmetric for entry in plan.layers.values())
    assert all(torch.equal(codes.weights[layer].decode(), made.decoded(layer)) for layer in made.layers())
    assert plan.search["scores"]["all A8"] < plan.search["scores"]["plan"] < plan.search["scores"]["all A4"]


def test_what_does_not_go_with_it(tiny_folder, here, capsys):
    folder = tiny_folder("qwen2")
    Checkpoint(folder, group_size=16).write(here / "m", gptq(), gptq_config(16))
    before = set(here.iterdir())
    for arguments, match in [
        (["--transforms", "smooth"], "--transforms: does not go with --weights_from"),
        (["--weights", "awq"], "--weights: does not go with --weights_from"),
        (["--alpha", "0.5"], "--alpha: does not go with --weights_from"),
        (["--spaces", "ggml"], "--spaces: does not go with --weights_from"),
        (["--spaces", "a4a8,ggml"], "--spaces: does not go with --weights_from"),
        (["--bpw", "4"], "--bpw: only for types of a GGUF file"),
        ([], "Q4_0 blocks need groups of 32 or a multiple, got 16; use --target sim"),
        (["--model_id", str(tiny_folder("llama"))], "model_type: the checkpoint is of another model"),
        (["--weights_from", str(folder)], "the checkpoint is not quantised"),
        (["--weights_from", "none"], "no such folder"),
    ]:
        fails(capsys, search(folder, "m", *arguments), match=match)
        assert set(here.iterdir()) == before
