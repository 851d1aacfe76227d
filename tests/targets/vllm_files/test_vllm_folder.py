"""Folders in the compressed-tensors format: transformers loads them unpatched and says what the simulation says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte import cli
from halfbyte.core import files
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import layers_of
from halfbyte.models.loading import load
from halfbyte.plan import codes_path, load_codes, load_plan
from halfbyte.prepare.simulation import load_for_plan
from halfbyte.quant.int4 import GroupedWeight, PackedWeight
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.targets import TARGETS
from halfbyte.targets.vllm_files import export as exporting_vllm
from halfbyte.targets.vllm_files.compressed import logits_in_transformers
from halfbyte.targets.vllm_files.hopper import Hopper
from halfbyte.targets.vllm_files.tensors import check_tensors, exact_scales, packed_words, plan_tensors
from tests.command_line import fails, search
from tests.targets.plans import PLAN, plan_for
from tests.tiny_models import logits_of, some_ids

EXPORT = ["--config", PLAN, "--output", "out"]
HOPPER = {"hardware": "hopper", "a_bits": (8, 16)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def plain(tiny_folder, tmp_path_factory):
    """A plan of a tiny Llama, and the folder it is in."""
    folder = tmp_path_factory.mktemp("plain")
    return *plan_for(tiny_folder("llama"), folder / PLAN, transforms="none", weights="rtn", **HOPPER), folder


def export(at, *more, code=0):
    """Export the plan in ``at``; the folder is ``out``."""
    assert cli.run("export vllm", ["--config", str(at / PLAN), "--output", "out", *more]) == code


def stored(folder):
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    return found


def worst(ours, theirs):
    return float((ours - theirs).abs().max() / ours.abs().max())


@pytest.mark.parametrize(
    ("family", "options", "untied"),
    [
        ("llama", {}, False),
        ("qwen2", {}, False),
        ("qwen2-tied", {}, False),
        ("qwen2-tied", {"transforms": "r1,r2", "weights": "rtn"}, True),
    ],
)
def test_transformers_says_what_the_plan_says(family, options, untied, tiny_folder, here):
    """But for the weights of A8 layers, which CUTLASS looks up in fp8: the check simulates them plain."""
    source, plan = plan_for(tiny_folder(family), **HOPPER, **options)
    assert {entry.a_bits for entry in plan.layers.values()} == {8, 16}
    assert cli.run("export vllm", [*EXPORT, "--json", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["difference"] <= 1e-4
    ids = some_ids(source)
    theirs = logits_in_transformers(Path("out"), ids[None])[0]
    assert 0 < worst(logits_of(source.model, ids), theirs) < 0.3
    tensors, config = stored("out"), json.loads(Path("out/config.json").read_text())
    assert "model.embed_tokens.weight" in tensors
    tied = family.endswith("-tied") and not untied
    assert config["tie_word_embeddings"] == tied == ("lm_head.weight" not in tensors)
    assert AutoTokenizer.from_pretrained("out").chat_template == source.tokenizer.chat_template


def test_without_its_activation_bits_the_model_is_another(tiny_folder, here, capsys, monkeypatch):
    """The comparison sees what an engine might leave out."""
    plan_for(tiny_folder("llama"), weights="rtn", **HOPPER)
    written = Hopper.quantization_config

    def without(self, source, plan):
        config = written(self, source, plan)
        for group in config["config_groups"].values():
            group.pop("input_activations", None)
        return config

    monkeypatch.setattr(Hopper, "quantization_config", without)
    fails(capsys, cli.run("export vllm", EXPORT), match="transformers does not agree with the simulation")
    assert not Path("out").exists()


def test_a_bf16_checkpoint_stays_bf16_where_that_is_exact(tiny_folder, here):
    """Searched in fp32: rotated embedding and head are as large as before, norms keep the bits they need."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2"), dtype=torch.bfloat16)
    model.save_pretrained("m")
    AutoTokenizer.from_pretrained(tiny_folder("qwen2")).save_pretrained("m")
    source, _ = plan_for(Path("m"), weights="rtn", **HOPPER)
    assert cli.run("export vllm", EXPORT) == 0
    tensors = stored("out")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert tensors[name].dtype == torch.bfloat16, name
        assert torch.equal(tensors[name].float(), source.model.get_parameter(name)), name
    for name in ("model.layers.0.self_attn.v_proj.bias", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(tensors[name].float(), source.model.get_parameter(name)), name
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16


def test_codes_are_packed_as_the_library_packs_them():
    weight = round_to_nearest(torch.randn(24, 96, generator=torch.Generator().manual_seed(0)), 32)
    assert {-7, 7} <= set(weight.codes.flatten().tolist())
    weight.codes[0, :2] = torch.tensor([-8, 7], dtype=torch.int8)
    assert torch.equal(packed_words(weight.pack(), "here"), pack_to_int32(weight.codes, 4))
    with pytest.raises(HalfbyteError, match="here: a row does not fill 32-bit words"):
        packed_words(GroupedWeight(weight.codes[:, :12], weight.scales).pack(), "here")


@pytest.mark.parametrize("scale", [-1 - 2**-10, 1 + 2**-10])
def test_scales_that_vllm_would_change_are_refused(scale):
    packed = torch.zeros(1, 16, dtype=torch.uint8)
    with pytest.raises(HalfbyteError, match=r"layer: scales are not what vLLM computes with.*--target vllm"):
        exact_scales(PackedWeight(packed, torch.tensor([[scale]], dtype=torch.float16)), "layer")


def test_the_config_names_every_layer_in_one_group(plain, here):
    _, plan, at = plain
    export(at, "--no-check")
    config = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert (config["format"], config["quantization_status"]) == ("pack-quantized", "compressed")
    assert config["ignore"] == ["lm_head"]
    named = {}
    for group in config["config_groups"].values():
        weights, inputs = group["weights"], group.get("input_activations")
        assert (weights["symmetric"], weights["strategy"], group["format"]) == (True, "group", "pack-quantized")
        if inputs:
            assert (inputs["type"], inputs["strategy"], inputs["dynamic"]) == ("float", "token", True)
        for name in group["targets"]:
            assert name not in named
            named[name] = (weights["num_bits"], weights["group_size"], inputs["num_bits"] if inputs else 16)
    assert named == {name: (4, entry.group_size, entry.a_bits) for name, entry in plan.layers.items()}


def test_the_size_is_what_the_format_costs(plain, here):
    source, plan, at = plain
    export(at, "--no-check", "--json", "e.json")
    linear = 0
    for layer in layers_of(source.model, source.family):
        linear += layer.macs // 2 + 2 * layer.macs // plan.layers[layer.name].group_size + 2 * 8
    rest = sum(4 * value.numel() for name, value in source.model.named_parameters() if "_proj" not in name)
    assert json.loads(Path("e.json").read_text())["bytes"] == linear + rest
    assert sum(file.stat().st_size for file in Path("out").glob("*.safetensors")) < (linear + rest) * 1.01 + 20_000


def test_shards(plain, here):
    source, _, at = plain
    export(at, "--shard_size", "200KB")  # with the check
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    shards = sorted(Path("out").glob("*.safetensors"))
    assert len(shards) > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())
    limit = max(200_000, 4 * source.model.get_input_embeddings().weight.numel())
    for path in shards:
        with safe_open(path, framework="pt") as handle:
            assert {index["weight_map"][name] for name in handle.keys()} == {path.name}  # noqa: SIM118
        assert path.stat().st_size < limit + 20_000
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored("out").values())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight_packed", "model.norm.weight"])
def test_the_check_sees_a_damaged_tensor(name, plain, here):
    source, _, at = plain
    export(at, "--no-check")
    codes = load_codes(codes_path(at / PLAN))
    target = TARGETS["vllm"].on("hopper")
    entries = plan_tensors(load(source.origin, device=source.device, dtype=torch.float32), codes, target.weights)
    how = (target.packed_name, target.unpack)
    check_tensors(Path("out"), entries, codes, *how)
    tensors = load_file("out/model.safetensors")
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HalfbyteError, match=f"{name}: tensor data differs"):
        check_tensors(Path("out"), entries, codes, *how)
    del tensors[name]
    save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HalfbyteError, match=f"tensors are missing, got {name}"):
        check_tensors(Path("out"), entries, codes, *how)


def test_the_card_says_what_it_is_and_how_it_was_measured(plain, here):
    _, plan, at = plain
    export(at, "--no-check")
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert plan.model_id not in card  # a path here
    made = (Path(plan.model_id).name, plan.hash, plan.fingerprint, "random tokens", "128 calib", "halfbyte test")
    for said in (*made, "| plan", "0.500"):
        assert said in card, said
    first = next(line for line in card.splitlines() if line.strip("| ").startswith("0 "))
    bits = [f"A{entry.a_bits}" for name, entry in plan.layers.items() if ".0." in name]
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["0", *bits]
    assert "sm90" in card


def test_plans_for_other_targets_are_refused(tiny_folder, here, capsys):
    folder = tiny_folder("llama")
    plan_for(folder, target="gguf", weights="rtn", transforms="none")
    fails(
        capsys,
        cli.run("export vllm", EXPORT),
        match="expected vllm on a named GPU, got gguf; search again: halfbyte search --model_id "
        f"{folder} --target vllm --hardware GPU --output FILE",
    )
    plan_for(folder, weights="rtn", transforms="none", **HOPPER)
    for command in (["export", "gguf"], ["export"]):
        code = cli.main([*command, "--config", PLAN, "--output", "m.gguf"])
        fails(capsys, code, match="expected gguf, got vllm; search again with --target gguf")
    assert {path.name for path in here.iterdir()} == {PLAN, codes_path(PLAN).name}


def test_existing_outputs(plain, here, capsys):
    _, _, at = plain
    arguments = ["export", "vllm", "--config", str(at / PLAN), "--output", "out", "--no-check"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    fails(capsys, cli.main(arguments), match="output already exists")
    assert cli.main([*arguments, "--force"]) == 0
    capsys.readouterr()
    (Path("out") / "mine.txt").write_text("")
    fails(capsys, cli.main([*arguments, "--force"]), match="what halfbyte did not write, got mine.txt")
    Path("file").write_text("")
    fails(capsys, cli.main([*arguments[:-2], "file"]), match="output is a file")
    assert {path.name for path in here.iterdir()} == {"out", "file"}


@pytest.mark.parametrize("when", ["write_tensors", "_write_config", "check_tensors"])
def test_an_interrupted_export_leaves_nothing(when, plain, here, capsys, monkeypatch):
    _, _, at = plain
    work = getattr(exporting_vllm, when)

    def interrupted(*arguments, **more):
        work(*arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting_vllm, when, interrupted)
    export(at, code=2)
    assert "interrupted after" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_loads(plain, here, monkeypatch):
    """config.json is written last, so what is left of a process that could not clean up is not a model."""
    _, _, at = plain
    seen = []
    monkeypatch.setattr(exporting_vllm, "_write_config", lambda folder, *_, **__: seen.extend(folder.iterdir()))
    export(at, "--no-check")
    names = {path.name for path in seen}
    assert {"model.safetensors", "tokenizer.json", "README.md", "generation_config.json"} <= names
    assert "config.json" not in names


def test_a_full_disk_is_one_line(plain, here, capsys, monkeypatch):
    _, _, at = plain
    arguments = ["--config", str(at / PLAN), "--output", "out", "--no-check"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting_vllm, "write_text", full)
    fails(capsys, cli.run("export vllm", arguments), match="disk is full")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: files.shutil._ntuple_diskusage(1, 1, 10))
    fails(capsys, cli.run("export vllm", arguments), match="disk is too small")
    assert list(here.iterdir()) == []


def test_what_vllm_cannot_run_is_refused_before_the_search(tiny_folder, here, capsys):
    folder = tiny_folder("llama")
    ada, hopper = ["--hardware", "ada"], ["--hardware", "sm90"]
    for arguments, match in [
        ([*ada, "--granularity", "layer"], "--granularity: vLLM wants one choice for q, k and v"),
        ([*ada, "--spaces", "a4a8,ggml"], "the target vllm does not have this, expected activations, got types"),
        ([*ada, "--transforms", "smooth,learned"], "the target vllm cannot run this transform"),
        ([*hopper, "--transforms", "online"], "the target vllm cannot run this transform"),
        ([*ada, "--group_size", "32"], "int4 activations want weights in groups of 64"),
        ([*hopper, "--group_size", "64"], "CUTLASS W4A8 wants weights in groups of 128"),
        ([*hopper, "--target_compression", "0.75"], "expected 1 (all A8) to 2 (all A16), got 0.75"),
        ([*ada, "--target_compression", "1.25"], "expected 0.5 (all A4) to 1 (all A8), got 1.25"),
        ([*ada, "--tensor_parallel", "3"], "does not divide the model's attention heads, expected a divisor of 4"),
        (["--hardware", "sm70"], "--hardware: unknown GPU, expected auto, turing"),
        (["--hardware", "auto"], "--hardware: which GPU will vLLM run on?"),
        ([*ada, "--weights_from", str(folder)], "not those that vLLM's kernels compute with"),
        ([*ada, "--max_kl", "1e-9"], "--max_kl: no choice of activation bits reaches it"),
    ]:
        fails(capsys, search(folder, "--target", "vllm", *arguments), match=match)
    fails(capsys, search(folder, "--hardware", "ada"), match="--hardware: only for --target vllm")
    assert [path for path in here.iterdir() if not path.name.startswith(".")] == []


def test_units_that_cutlass_cannot_run_stay_a16(tiny_folder, here):
    """192 inputs are no multiple of 128, but the 384 outputs of gate and up together are."""
    folder = tiny_folder("llama", intermediate_size=192)
    assert search(folder, "--target", "vllm", "--hardware", "hopper", "--target_compression", "1.6") == 0
    layers = load_plan("mixed_precision_config.pt").layers
    assert {entry.a_bits for name, entry in layers.items() if name.endswith("down_proj")} == {16}
    assert {entry.a_bits for name, entry in layers.items() if not name.endswith("down_proj")} == {8, 16}


@pytest.mark.parametrize("hardware", ["ada", "hopper"])
def test_from_search_to_folder(hardware, tiny_folder, here, capsys):
    """The whole way on the command line."""
    assert search(tiny_folder("llama-tied"), "--target", "vllm", "--hardware", hardware) == 0
    assert cli.main(["export", "vllm", "--output", "out"]) == 0
    out = capsys.readouterr().out
    plan = load_plan("mixed_precision_config.pt")
    assert plan.hardware == {"ada": "sm89", "hopper": "sm90"}[hardware]
    assert {entry.arithmetic for entry in plan.layers.values()} == {{"ada": "humming", "hopper": "cutlass"}[hardware]}
    assert ("int4 g128, A4, Hadamard" in out) == (hardware == "ada")
    assert cli.main(["simulate", "--text", "pydoc", "--ctx", "64", "--chunks", "2", "--max_tokens", "4"]) == 0


def test_a_folder_for_humming_says_what_each_module_computes(tiny_folder, here):
    _, plan = plan_for(tiny_folder("qwen2"), weights="rtn")
    assert cli.run("export vllm", [*EXPORT, "--json", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["not_compared"] == "nothing but vLLM reads this format"
    config = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["allow_fallback"]) == ("humming", False)
    modules = {"qkv_proj": "q_proj", "o_proj": "o_proj", "gate_up_proj": "up_proj", "down_proj": "down_proj"}
    for fused, part in modules.items():
        inside = "self_attn" if part in ("q_proj", "o_proj") else "mlp"
        found = [
            settings
            for pattern, settings in config["dynamic"].items()
            if re.match(pattern.removeprefix("+:"), f"model.layers.1.{inside}.{fused}")
        ]
        entry = plan.layers[f"model.layers.1.{inside}.{part}"]
        assert len(found) == 1
        assert found[0]["a_dtype"] == f"int{entry.a_bits}"
        assert found[0]["hadamard_block_size"] == entry.rotation_block > 1
        assert found[0]["input_scale_group_size"] == found[0]["weight_scale_group_size"] == entry.group_size
    tensors, codes = stored("out"), load_codes(codes_path(PLAN))
    name = "model.layers.0.mlp.down_proj"
    words, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    nibbles = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).flatten(1)
    decoded = (nibbles.float() - 8) * scales.float().repeat_interleave(128, dim=1)
    assert torch.equal(decoded, codes.weights[name].decode())


def test_rotations_stay_within_one_gpus_part(tiny_folder, here):
    _, plan = plan_for(tiny_folder("llama"), weights="rtn", tensor_parallel=2)
    blocks = {name.rpartition(".")[2]: entry.rotation_block for name, entry in plan.layers.items()}
    _, alone = plan_for(tiny_folder("llama"), weights="rtn")
    whole = {name.rpartition(".")[2]: entry.rotation_block for name, entry in alone.layers.items()}
    assert blocks["down_proj"] == whole["down_proj"] // 2
    assert blocks["up_proj"] == whole["up_proj"]


def test_the_cheapest_plan_within_a_kl(tiny_folder, here):
    folder = tiny_folder("llama")
    found = {}
    for limit in ("0.12", "0.2", "100"):
        assert search(folder, "--target", "vllm", "--hardware", "ada", "--max_kl", limit, "--force") == 0
        plan = load_plan("mixed_precision_config.pt")
        assert plan.search["validation"]["plan"] <= float(limit)
        found[limit] = plan.budget_reached
    assert found["0.12"] >= found["0.2"] >= found["100"] == 0.5


def test_weights_that_have_codes_are_not_read(plain, monkeypatch):
    """The values of a 7B model's layers are 13 GB that no export needs."""
    source, plan, _ = plain
    seen = []
    known = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda x: seen.append(x.numel()) or known(x))
    again = load_for_plan(plan, None, device="cpu", dtype="stored", packed=True)
    assert again.fingerprint == source.fingerprint
    assert sum(seen) == sum(value.numel() for name, value in again.model.named_parameters() if "_proj" not in name)


def test_a_model_that_cutlass_cannot_run_is_all_a16(tiny_folder, here, capsys):
    """Without being asked the budget is one that can be met; one that is asked for is refused with the range."""
    folder = tiny_folder("llama", hidden_size=192, intermediate_size=320)
    arguments = ["--target", "vllm", "--hardware", "hopper"]
    code = search(folder, *arguments, "--target_compression", "1.25")
    fails(capsys, code, match="expected 2 (all A16) to 2 (all A16), got 1.25")
    assert search(folder, *arguments) == 0
    plan = load_plan("mixed_precision_config.pt")
    assert {entry.a_bits for entry in plan.layers.values()} == {16}
    assert plan.budget_reached == plan.budget_asked == 2
