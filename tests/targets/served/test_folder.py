"""Reading a folder, its problems, its report and its twins; no engine and no particular hardware."""

from __future__ import annotations

import json
import os

import pytest
import torch

from halfbyte import cli
from halfbyte.core.errors import HalfbyteError
from halfbyte.targets.served.folder import matches, read_served, tensor_parallel_sizes
from halfbyte.targets.served.report import block_rows, describe
from halfbyte.targets.served.rules import HARDWARE, named, this_machine
from halfbyte.targets.served.twins import humming_input, write_twins
from tests.served_folders import groups_of, header_folder

MIXED = groups_of({4: ["re:.*layers.0.mlp.*"], 8: ["Linear"]})


@pytest.fixture
def mixed(tmp_path):
    return header_folder(tmp_path / "model", MIXED)


def test_layers_of_a_mixed_folder(mixed):
    folder = read_served(mixed)
    schemes = {layer.name: layer.scheme for layer in folder.layers}
    assert list(schemes)[:4] == [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"]
    assert schemes["model.layers.0.mlp.down_proj"] == "W4A4 g128"
    assert schemes["model.layers.1.mlp.down_proj"] == schemes["model.layers.0.self_attn.o_proj"] == "W4A8 g128"
    assert folder.unquantised == ("lm_head",)
    assert folder.problems == ()
    q = folder.stored(folder.layers[0])  # q, k and v are multiplied as one
    assert (q.a_bits, q.in_features, q.out_features, q.dtype) == (8, 256, 512, "bfloat16")


def test_blocks_are_in_the_order_of_their_numbers(tmp_path):
    folder = read_served(header_folder(tmp_path / "deep", groups_of({8: ["Linear"]}), blocks=11))
    assert folder.layers[-1].name.startswith("model.layers.10.")
    headers, *rows = block_rows(describe(folder, HARDWARE["sm80"], "vllm").layers)
    assert headers[0] == "layers"
    assert [row[0] for row in rows] == ["model.layers.0 … 10"]


def test_what_a_target_means():
    assert matches("re:.*mlp.*", "model.layers.0.mlp.up_proj")
    assert matches("Linear", "anything")
    assert not matches("re:layers", "model.layers.0")  # from the start of the name
    assert not matches("model.layers.1", "model.layers.11")


@pytest.mark.parametrize(
    ("key", "engine", "a8", "a4"),
    [
        ("sm89", "vllm", "A16 in Marlin", "A16 in Marlin"),
        ("sm90", "vllm", "A16 in Machete", "A16 in Machete"),
        ("cpu-amx", "vllm", "A8 in CPUWNA16", "A8 in CPUWNA16"),
        ("cpu-avx2", "vllm", "does not run", "does not run"),
        ("sm89", "transformers", "A8 in floating point", "A4 in floating point"),
    ],
)
def test_report(mixed, key, engine, a8, a4):
    report = describe(read_served(mixed), HARDWARE[key], engine)
    assert report.counts == {f"W4A8 g128 → {a8}": 11, f"W4A4 g128 → {a4}": 3}
    layers = {row["name"]: row for row in report.to_dict()["layers"]}
    assert len(layers) == 14
    assert layers["model.layers.0.mlp.up_proj"]["a_bits"] == 4
    assert all(reason for reason in report.reasons)


def test_ways_to_have_it_otherwise(mixed):
    ways = {way.name: way for way in describe(read_served(mixed), HARDWARE["sm80"], "vllm").ways}
    assert ways["Humming's own choice"].counts == {"W4A8 g128 → A16 in Humming": 11, "W4A4 g128 → A4 in Humming": 3}
    assert ways["all A8"].counts == {"W4A8 g128 → A8 in Marlin": 11, "W4A4 g128 → A8 in Marlin": 3}
    assert ways["as the folder says"].counts == {"W4A8 g128 → A8 in Humming": 11, "W4A4 g128 → A4 in Humming": 3}
    hopper = {way.name for way in describe(read_served(mixed), HARDWARE["sm90"], "vllm").ways}
    assert hopper == {"Humming's own choice", "all A8"}  # int4 has no kernel there
    assert describe(read_served(mixed), HARDWARE["cpu-avx512"], "vllm").ways == ()
    assert describe(read_served(mixed), HARDWARE["rocm"], "vllm").ways == ()


PROBLEMS = {
    "asymmetric": (groups_of({8: ["Linear"]}, symmetric=False), {}, "asymmetric"),
    "static": (groups_of({8: ["Linear"]}, dynamic=False), {}, "fixed scales"),
    "float": (groups_of({8: ["Linear"]}, type="float"), {}, "float8"),
    "status": (MIXED, {"quantization_status": "frozen"}, "quantises the weights again"),
    "format": (MIXED, {"format": "int-quantized"}, "format int-quantized"),
    "transforms": (MIXED, {"transform_config": {"config_groups": {"R4": {}}}}, "one GPU only"),
    "nobody's": (groups_of({8: ["re:.*mlp.*"]}), {}, "no config group names it"),
    "fused": (groups_of({4: ["re:.*q_proj"], 8: ["Linear"]}), {}, "gives all of them the scheme of q_proj"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_said(tmp_path, name):
    groups, changes, words = PROBLEMS[name]
    assert words in " ".join(read_served(header_folder(tmp_path / "m", groups, **changes)).problems)


def test_a_fused_module_computes_as_its_first_part(tmp_path):
    groups = groups_of({4: ["re:.*q_proj"], 8: ["Linear"]})
    folder = read_served(header_folder(tmp_path / "m", groups))
    ways = {way.name: way for way in describe(folder, HARDWARE["sm80"], "vllm").ways}
    assert ways["Humming's own choice"].counts["W4A8 g128 → A4 in Humming"] == 4  # k and v of two blocks


def test_tied_without_an_embedding(tmp_path):
    path = header_folder(tmp_path / "m", MIXED)
    config = json.loads((path / "config.json").read_text())
    assert not any("embedding" in problem for problem in read_served(path).problems)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert any("embedding is not in the file" in problem for problem in read_served(path).problems)


def test_tensor_parallel_divides_heads_and_groups(mixed):
    folder = read_served(mixed)
    assert tensor_parallel_sizes(folder) == (1, 2)  # o_proj: 256 = 2 · 128 inputs
    config = {**folder.config, "num_attention_heads": 3}
    assert tensor_parallel_sizes(type(folder)(folder.path, config, folder.layers, (), ())) == (1,)


def test_transforms_forbid_tensor_parallelism(tmp_path):
    changes = {"transform_config": {"config_groups": {"R4": {}}}}
    assert tensor_parallel_sizes(read_served(header_folder(tmp_path / "m", MIXED, **changes))) == (1,)


def test_twins_differ_in_the_config_only(mixed, tmp_path):
    folder = read_served(mixed)
    written = write_twins(folder, tmp_path / "twins")
    assert [path.name for path in written] == ["w4a16", "w4a8", "w4a4", "humming-input.json"]
    for path, bits in zip(written, (16, 8, 4), strict=False):
        assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
        assert os.path.samefile(path / "model.safetensors", mixed / "model.safetensors")
        twin = read_served(path)
        assert {layer.a_bits for layer in twin.layers} == {bits}
        assert [layer.name for layer in twin.layers] == [layer.name for layer in folder.layers]
        assert [group["targets"] for group in twin.quantisation["config_groups"].values()] == [["Linear"]]
        assert twin.problems == ()
    assert json.loads((mixed / "config.json").read_text()) == folder.config  # the folder itself is as it was


def test_groups_with_other_weights_stay_apart(tmp_path):
    groups = groups_of({4: ["re:.*down_proj"], 8: ["Linear"]})
    groups["group_0"]["weights"]["group_size"] = 64
    folder = read_served(header_folder(tmp_path / "m", groups))
    path = write_twins(folder, tmp_path / "twins")[0]
    twin = read_served(path)
    assert [layer.group_size for layer in twin.layers] == [layer.group_size for layer in folder.layers]
    assert {layer.a_bits for layer in twin.layers} == {16}
    assert not (tmp_path / "twins" / "humming-input.json").exists()


def test_humming_is_told_every_module(mixed, tmp_path):
    assert humming_input(read_served(mixed)) == {
        "dtype": "int8",
        "quant_mode": "dynamic_token",
        "dynamic": {
            r"+:model\.layers\.0\.mlp\.gate_up_proj$": {"dtype": "int4"},
            r"+:model\.layers\.0\.mlp\.down_proj$": {"dtype": "int4"},
        },
    }
    uniform = read_served(header_folder(tmp_path / "a4", groups_of({4: ["Linear"]})))
    assert humming_input(uniform) == {"dtype": "int4", "quant_mode": "dynamic_token"}
    unsaid = read_served(header_folder(tmp_path / "re", groups_of({8: ["re:.*_proj"]}), ignore=[]))
    assert humming_input(unsaid) is None  # "Linear" would mean the output head too
    changes = {"transform_config": {"config_groups": {"R4": {}}}}
    assert humming_input(read_served(header_folder(tmp_path / "r4", MIXED, **changes))) is None
    assert humming_input(read_served(header_folder(tmp_path / "a16", groups_of({16: ["Linear"]})))) is None


def test_twins_overwrite_nothing(mixed, tmp_path, monkeypatch):
    folder = read_served(mixed)
    (tmp_path / "there").mkdir()
    with pytest.raises(HalfbyteError, match="already exists"):
        write_twins(folder, tmp_path / "there")
    with pytest.raises(HalfbyteError, match="inside the folder"):
        write_twins(folder, mixed / "twins")

    def other_disk(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    with pytest.raises(HalfbyteError, match="cannot be linked"):
        write_twins(folder, tmp_path / "twins")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there"]  # nothing is left behind


def test_folders_that_are_none(tmp_path, mixed):
    with pytest.raises(HalfbyteError, match="no such folder"):
        read_served(tmp_path / "nowhere")
    with pytest.raises(HalfbyteError, match=r"no config\.json"):
        read_served(tmp_path)
    config = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(HalfbyteError, match="another quantisation method"):
        read_served(mixed)
    (mixed / "config.json").write_text("{}")
    with pytest.raises(HalfbyteError, match="not quantised"):
        read_served(mixed)
    (mixed / "config.json").write_text(json.dumps(config))
    (mixed / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(HalfbyteError, match="shard is damaged"):
        read_served(mixed)
    (mixed / "model.safetensors").unlink()
    with pytest.raises(HalfbyteError, match="no safetensors"):
        read_served(mixed)


def test_hardware_by_name_and_by_device(monkeypatch):
    assert named("sm120").capability == 120
    with pytest.raises(HalfbyteError, match="unknown hardware"):
        named("sm1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert this_machine(torch.device("cuda")).key == "sm89"
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for amx, wide, key in ((True, True, "cpu-amx"), (False, True, "cpu-avx512"), (False, False, "cpu-avx2")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda wide=wide: wide, raising=False)
        assert this_machine(torch.device("cpu")).key == key
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert this_machine(torch.device("cpu")).key == "cpu-arm"


def test_on_the_command_line(mixed, tmp_path, capsys):
    arguments = ["doctor", "--served", str(mixed), "--engine", "vllm", "--hardware", "sm80", "--device", "cpu"]
    out = ["--twins", str(tmp_path / "twins"), "--json", str(tmp_path / "r.json")]
    assert cli.main([*arguments, *out]) == 0
    said = capsys.readouterr().out
    assert "W4A4 g128 → A16 in Marlin" in said
    assert "A4 → A16" in said
    assert "tensor parallel: 1, 2" in said
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["counts"] == {"W4A8 g128 → A16 in Marlin": 11, "W4A4 g128 → A16 in Marlin": 3}
    assert written["hardware"]["key"] == "sm80"
    assert len(written["layers"]) == 14
    assert cli.main([*arguments, "--twins", str(tmp_path / "twins")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main(["doctor", "--twins", "x"]) == 2
    assert cli.main(["doctor", "--served", str(mixed), "--hardware", "sm1"]) == 2
