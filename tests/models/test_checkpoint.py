"""Codes of checkpoints: what is read is what was stored, and what cannot be taken over is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.checkpoint import CheckpointCodes, QuantisedFolder
from halfbyte.quant.int4 import ScaleRule
from tests.quantised_folders import Checkpoint, compressed, compressed_config, edited, gptq, gptq_config, scheme

LAYER = "model.layers.0.mlp.down_proj"
FORMATS = {
    "compressed-tensors": (compressed, compressed_config()),
    "W4A8": (compressed, compressed_config(scheme(8))),
    "W4A8 and W4A4": (compressed, compressed_config(scheme(8), scheme(4))),
    "gptq": (gptq(1), gptq_config()),
    "gptq, old name": (gptq(1), {key: value for key, value in gptq_config().items() if key != "quant_method"}),
    "gptq_v2": (gptq(2), gptq_config(checkpoint_format="gptq_v2")),
    "act-order in static groups": (gptq(1), gptq_config(desc_act=True, static_groups=True)),
}


def codes_of(folder, source, **more):
    return CheckpointCodes(QuantisedFolder(folder), source, **more)


def agrees(made, codes):
    for layer in made.layers():
        weight = codes.weight(layer, made.codes[layer].shape[1])
        assert torch.equal(weight.unpack().codes, made.codes[layer]), layer
        assert torch.equal(weight.decode(), made.decoded(layer)), layer


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_stored(tiny, tmp_path, name):
    source, (pack, config) = tiny("llama"), FORMATS[name]
    made = Checkpoint(source.origin.folder)
    codes = codes_of(made.write(tmp_path / "m", pack, config, old_config="old name" in name), source)
    agrees(made, codes)
    assert codes.parameters == {}
    assert set(codes.group_sizes.values()) == {32}
    assert codes.note(LAYER, 32) == ""
    assert codes.folder.format.notes == (("its activation quantisation is not taken over",) if "W4A" in name else ())


@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied"])
def test_shards_biases_and_other_parameters(tiny, tmp_path, family):
    """In bf16 scales are exact; what of the rest changes by that is in the plan."""
    source = tiny(family)
    made = Checkpoint(source.origin.folder, 64, dtype=torch.bfloat16, rest=torch.bfloat16)
    folder = made.write(tmp_path / "m", compressed, compressed_config(scheme(group_size=64)), shards=3)
    codes = codes_of(folder, source)
    agrees(made, codes)
    others = {name for name, _ in source.model.named_parameters(remove_duplicate=False)}
    assert set(codes.parameters) == others - {f"{layer}.weight" for layer in made.layers()}
    assert any(name.endswith("q_proj.bias") for name in codes.parameters)
    for name, value in codes.parameters.items():
        assert torch.equal(value.float(), made.model.get_parameter(name).bfloat16().float())
    assert codes.note(LAYER, 128) == "group 64: as in m, not 128"


def test_a_tied_head_goes_with_its_embedding(tiny, tmp_path):
    source = tiny("qwen2-tied")
    made = Checkpoint(source.origin.folder)
    with torch.no_grad():
        made.model.model.embed_tokens.weight.mul_(2)
    codes = codes_of(made.write(tmp_path / "m", gptq(), gptq_config()), source)
    assert set(codes.parameters) == {"model.embed_tokens.weight", "lm_head.weight"}
    head, embedding = codes.parameters["lm_head.weight"], codes.parameters["model.embed_tokens.weight"]
    assert torch.equal(head, embedding)
    assert head.data_ptr() != embedding.data_ptr()


def test_scales_below_the_range_of_fp16_are_counted(tiny, tmp_path):
    source = tiny("llama")
    made = Checkpoint(source.origin.folder, dtype=torch.bfloat16)
    with torch.no_grad():
        made.model.get_submodule(LAYER).weight[3].mul_(1e-4)
    codes = codes_of(made.write(tmp_path / "m", compressed, compressed_config()), source)
    inexact = made.scales[LAYER].to(torch.float16).float() != made.scales[LAYER].float()
    count = int(inexact.sum())
    assert 0 < count <= 8
    assert bool(inexact[3].any())
    assert not bool(inexact[:3].any())
    assert codes.note(LAYER, 32) == f"{count} scales of m are not exact in fp16 and were rounded"
    assert codes.record()["rounded_scales"] == count
    agrees(made, codes)


def test_zeros_for_biases_that_there_are_not(tiny, tmp_path):
    source = tiny("llama")
    made = Checkpoint(source.origin.folder)
    folder = made.write(
        tmp_path / "m", gptq(), gptq_config(), change=lambda t: t.update({f"{LAYER}.bias": torch.zeros(128)})
    )
    agrees(made, codes_of(folder, source))
    edited(folder, lambda t: t[f"{LAYER}.bias"].add_(1))
    with pytest.raises(HalfbyteError, match=r"down_proj\.bias: tensor is unknown to the model"):
        codes_of(folder, source)


def test_the_digest_is_of_config_and_tensors(tiny, tmp_path):
    made = Checkpoint(tiny("llama").origin.folder)
    folder = made.write(tmp_path / "m", gptq(), gptq_config())
    first = QuantisedFolder(folder).digest
    assert first == QuantisedFolder(shutil.copytree(folder, tmp_path / "copied")).digest
    edited(folder, lambda t: t[f"{LAYER}.qweight"].add_(1))
    assert first != QuantisedFolder(folder).digest


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A checkpoint of each format, to be damaged."""
    made = {}
    for name, pack, config in (("gptq", gptq(), gptq_config()), ("compressed", compressed, compressed_config())):
        checkpoint = Checkpoint(tiny("llama").origin.folder)
        made[name] = checkpoint.write(tmp_path_factory.mktemp("checkpoints") / name, pack, config)
    return made


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def times(name, factor):
    return lambda tensors: tensors.update({name: tensors[name].float() * factor})


TENSORS = {
    "not quantised": (
        "gptq",
        lambda t: t.update({f"{LAYER}.weight": t.pop(f"{LAYER}.qweight")}),
        "layer is not quantised, expected int4 codes, got float weights",
    ),
    "missing": ("compressed", drop(f"{LAYER}.weight_packed"), "weight_packed: tensor is missing"),
    "no zeros": ("gptq", drop(f"{LAYER}.qzeros"), "qzeros: tensor is missing"),
    "no norm": ("gptq", drop("model.norm.weight"), "model.norm.weight: tensor is missing"),
    "unknown": ("gptq", put("model.layers.0.extra", torch.zeros(1)), "extra: tensor is unknown to the model"),
    "8 bits": (
        "gptq",
        put(f"{LAYER}.qweight", torch.zeros(64, 128, dtype=torch.int32)),
        "expected [32, 128], got [64, 128]",
    ),
    "int8": ("compressed", put(f"{LAYER}.weight_packed", torch.zeros(128, 32, dtype=torch.int8)), "packed otherwise"),
    "per channel": (
        "compressed",
        put(f"{LAYER}.weight_scale", torch.ones(128, 1)),
        "expected 8 groups of 32, got 1 scales per output for 256 inputs",
    ),
    "other groups": ("gptq", put(f"{LAYER}.scales", torch.ones(4, 128)), "got 4 scales per output for 256 inputs"),
    "zero points": ("gptq", lambda t: t[f"{LAYER}.qzeros"][3].add_(1), "codes are not symmetric"),
    "zero points too": (
        "compressed",
        put(f"{LAYER}.weight_zero_point", torch.ones(128, 8, dtype=torch.int8)),
        "codes are not symmetric",
    ),
    "act-order": (
        "gptq",
        lambda t: t.update({f"{LAYER}.g_idx": t[f"{LAYER}.g_idx"].flip(0)}),
        "(act-order), expected column 0 in group 0, got group 7",
    ),
    "too large": ("gptq", times(f"{LAYER}.scales", 1e7), "scales too large for fp16, expected at most 65504"),
    "NaN": ("compressed", times(f"{LAYER}.weight_scale", float("nan")), "scales are not finite"),
    "NaN norm": ("compressed", times("model.norm.weight", float("nan")), "values are not finite"),
    "vocabulary": ("gptq", put("model.embed_tokens.weight", torch.zeros(10, 128)), "does not fit the model"),
    "head": (
        "gptq",
        put("lm_head.qweight", torch.zeros(16, 10, dtype=torch.int32)),
        "embedding and head cannot be taken over as codes",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_cannot_be_taken_over(tiny, folders, tmp_path, name):
    form, change, match = TENSORS[name]
    folder = edited(shutil.copytree(folders[form], tmp_path / "m"), change)
    with pytest.raises(HalfbyteError) as raised:
        codes_of(folder, tiny("llama"))
    assert match in str(raised.value)
    assert str(folder) in str(raised.value)


def test_order_must_be_said_where_there_may_be_one(tiny, folders, tmp_path):
    folder = edited(shutil.copytree(folders["gptq"], tmp_path / "m"), drop(f"{LAYER}.g_idx"))
    codes_of(folder, tiny("llama"))
    _reconfigure(folder, lambda config: config["quantization_config"].update(desc_act=True))
    with pytest.raises(HalfbyteError, match="g_idx: tensor is missing"):
        codes_of(folder, tiny("llama"))


def _reconfigure(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e-3), ("num_key_value_heads", 4), ("head_dim", 16), ("hidden_act", "gelu")]
)
def test_another_architecture_is_refused(tiny, folders, tmp_path, key, value):
    folder = shutil.copytree(folders["gptq"], tmp_path / "m")
    _reconfigure(folder, lambda config: config.update({key: value}))
    with pytest.raises(HalfbyteError, match=f"{key}: the checkpoint is of another model"):
        codes_of(folder, tiny("llama"))


def test_another_rope_is_refused(tiny, folders, tmp_path):
    folder = shutil.copytree(folders["gptq"], tmp_path / "m")
    _reconfigure(folder, lambda config: config["rope_parameters"].update(rope_theta=5.0))
    with pytest.raises(HalfbyteError, match="rope_theta: the checkpoint is of another model, expected 10000"):
        codes_of(folder, tiny("llama"))


def test_folders_that_are_none(tiny, folders, tmp_path):
    original = tiny("llama").origin.folder
    broken, lacking = (shutil.copytree(folders["gptq"], tmp_path / name) for name in ("broken", "lacking"))
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    (lacking / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "y.safetensors"}}))
    (tmp_path / "empty").mkdir()
    for folder, match in [
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "config.json: file of the checkpoint is missing"),
        (original, "the checkpoint is not quantised"),
        (broken, "shard is truncated or corrupt"),
        (lacking, "y.safetensors: shard is missing"),
    ]:
        with pytest.raises(HalfbyteError, match=match):
            QuantisedFolder(folder)


def test_scales_for_engines_in_bf16_are_rounded_and_counted(tiny, tmp_path):
    source = tiny("llama")
    made = Checkpoint(source.origin.folder)
    folder = made.write(tmp_path / "m", gptq(), gptq_config())
    plain, codes = (codes_of(folder, source, rule=rule) for rule in (ScaleRule(), ScaleRule(bf16=True)))
    ours, theirs = (one.weight(LAYER, 256).scales.float() for one in (codes, plain))
    assert torch.equal(ours, theirs.bfloat16().float())
    assert codes.rounded[LAYER] == int((ours != theirs).sum()) > 0
    assert plain.rounded[LAYER] == 0
    assert f"{codes.rounded[LAYER]} scales of m are not exact in bf16" in codes.note(LAYER, 32)


def test_negative_scales_are_refused_where_an_engine_has_none(tiny, tmp_path):
    source = tiny("llama")
    folder = Checkpoint(source.origin.folder).write(tmp_path / "m", gptq(), gptq_config())
    edited(folder, lambda tensors: tensors[f"{LAYER}.scales"].mul_(-1))
    assert codes_of(folder, source).weight(LAYER, 256).scales.max() < 0
    with pytest.raises(HalfbyteError, match="scales are negative"):
        codes_of(folder, source, rule=ScaleRule(bf16=True, signed=False))
