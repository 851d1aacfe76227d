"""Our GGUF files: the same codes, read back by the gguf package, by transformers and by llama.cpp."""

import errno
import tracemalloc

import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType, dequantize
from transformers import AutoModelForCausalLM

import halfbyte.targets.gguf_files.tensors as gguf_tensors
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import listening
from halfbyte.engines import open_engine
from halfbyte.models.gguf_source import halves_from_pairs
from halfbyte.models.layers import layers_of
from halfbyte.models.loading import find, load
from halfbyte.quant.ggml.types import QUANTISED, encode
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.targets.gguf_files.tensors import EncodedRows
from halfbyte.targets.gguf_files.writer import check_gguf, write_gguf
from tests.tiny_models import F16, FAMILIES, keys, kl_of_llamacpp, logits_of, some_ids

F32 = {"embedding_type": "F32", "output_type": "F32"}


def codes_of(source, group_size=128):
    layers = layers_of(source.model, source.family)
    weights = {layer.name: source.model.get_submodule(layer.name).weight for layer in layers}
    return {name: round_to_nearest(weight, group_size).pack() for name, weight in weights.items()}


def all_f32(source):
    return {layer.name: "F32" for layer in layers_of(source.model, source.family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_q4_0_tensors_hold_exactly_the_codes(tiny, tmp_path, family):
    source = tiny(family)
    weights = codes_of(source)
    rows = write_gguf(tmp_path / "m.gguf", source, weights=weights)
    written = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert [row.name for row in rows] == list(written)
    for name, weight in weights.items():
        tensor = written[source.family.gguf_name(f"{name}.weight")]
        assert tensor.tensor_type.name == "Q4_0"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        heads = {"q_proj": source.config.num_attention_heads, "k_proj": source.config.num_key_value_heads}
        if source.family.interleaved_rope and name.rpartition(".")[2] in heads:
            values = halves_from_pairs(values, heads[name.rpartition(".")[2]])
        assert torch.equal(values, weight.decode()), name
    assert check_gguf(tmp_path / "m.gguf", source, weights) == len(rows) == len(written)
    assert ("output.weight" in written) == (not source.config.tie_word_embeddings)
    types = {row.name: row.type for row in rows}
    assert types["token_embd.weight"] == types.get("output.weight", "Q8_0") == "Q8_0"
    assert all(kind == "F32" for name, kind in types.items() if "norm" in name or "bias" in name)
    assert keys(tmp_path / "m.gguf")["general.file_type"] == LlamaFileType.MOSTLY_Q4_0


@pytest.mark.parametrize("family", FAMILIES)
def test_f16_file_says_in_llamacpp_what_the_model_says(tiny, tmp_path, family):
    source = tiny(family)
    write_gguf(tmp_path / "m.gguf", source, **F16)
    ids = some_ids(source)
    assert kl_of_llamacpp(tmp_path / "m.gguf", ids, logits_of(source.model, ids)) < 1e-5
    assert keys(tmp_path / "m.gguf")["general.file_type"] == LlamaFileType.MOSTLY_F16
    assert check_gguf(tmp_path / "m.gguf", source) > 0


def test_llamacpp_comparison_would_see_a_wrong_row_order(tiny, tmp_path, monkeypatch):
    source = tiny("llama")
    monkeypatch.setattr(gguf_tensors, "pairs_from_halves", lambda rows, heads: rows)
    write_gguf(tmp_path / "m.gguf", source, **F16)
    ids = some_ids(source)
    assert kl_of_llamacpp(tmp_path / "m.gguf", ids, logits_of(source.model, ids)) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_w4_file_says_in_llamacpp_what_the_codes_say(tiny, tmp_path, family):
    """llama.cpp rounds activations to 8 bits per block of 32; that is all that may differ."""
    source = load(tiny(family).origin, device=torch.device("cpu"), dtype=torch.float32)
    weights = codes_of(source)
    write_gguf(tmp_path / "m.gguf", source, weights=weights, **F16)
    ids = some_ids(source)
    original = logits_of(source.model, ids)
    for name, weight in weights.items():
        source.model.get_submodule(name).weight.copy_(weight.decode())
    decoded = logits_of(source.model, ids)
    kl = kl_of_llamacpp(tmp_path / "m.gguf", ids, decoded)
    assert kl < 2e-3
    assert kl < 0.1 * kl_of_llamacpp(tmp_path / "m.gguf", ids, original)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", FAMILIES)
def test_f32_file_loads_back_equal_and_exports_again_to_the_same_bytes(tiny, tmp_path, family):
    source = tiny(family)
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    types = all_f32(source)
    write_gguf(first, source, layer_types=types, metadata={"note": "first"}, **F32)
    ids = some_ids(source)
    reference = logits_of(source.model, ids)
    again = load(find(str(first)), device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(logits_of(again.model, ids), reference)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=first.name, dtype=torch.float32)
    assert torch.equal(logits_of(theirs, ids), reference)
    write_gguf(second, again, layer_types=types, metadata={"note": "first"}, **F32)
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def one_block(tiny):
    """Wide enough for blocks of 256 weights, and no larger: codebooks take their time."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return tiny("qwen2", hidden_size=256, head_dim=128, **sizes)


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_type_can_be_most_of_a_file(kind, one_block, tmp_path):
    """llama.cpp's file types are not named after their tensor types."""
    source = one_block
    layers = {layer.name: layer.in_features for layer in layers_of(source.model, source.family)}
    rows = {
        name: encode(source.model.get_submodule(name).weight, kind, importance=torch.linspace(1, 5, width))
        for name, width in layers.items()
    }
    path = tmp_path / "m.gguf"
    encoded = {name: EncodedRows(kind, torch.from_numpy(found)) for name, found in rows.items()}
    write_gguf(path, source, encoded=encoded)
    assert LlamaFileType(keys(path)["general.file_type"]).name.startswith(f"MOSTLY_{kind}")
    down = next(name for name in layers if name.endswith("down_proj"))
    expected = rows[down]
    written = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert np.array_equal(written[source.family.gguf_name(f"{down}.weight")].data.reshape(expected.shape), expected)


def test_layers_can_be_made_when_they_are_written(tiny, tmp_path):
    source = tiny("llama")
    name, weights = "model.layers.0.self_attn.q_proj", codes_of(source, 32)
    other = torch.randn(128, 128, generator=torch.Generator().manual_seed(2))
    del weights[name]
    given = {"weights": weights, "layer_types": {name: "Q8_0"}, "made": {name: lambda: other}}
    write_gguf(tmp_path / "m.gguf", source, **given)
    written = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    q = written["blk.0.attn_q.weight"]
    assert q.tensor_type.name == "Q8_0"
    values = halves_from_pairs(torch.from_numpy(dequantize(q.data, q.tensor_type)), 4)
    assert (values - other).abs().max() <= other.abs().max() / 127 / 2 * 1.01
    assert check_gguf(tmp_path / "m.gguf", source, **given) == len(written)
    with pytest.raises(HalfbyteError, match="another type"):
        check_gguf(tmp_path / "m.gguf", source, weights)
    with pytest.raises(HalfbyteError, match="no such layer"):
        write_gguf(tmp_path / "m.gguf", source, made={"lm_head": lambda: other})


def test_overrides_replace_parameters_and_can_untie_the_head(tiny, tmp_path):
    source = tiny("qwen2-tied")
    head = torch.randn(source.config.vocab_size, 128)
    overrides = {
        "model.norm.weight": torch.full((128,), 3.0),
        "model.layers.1.self_attn.k_proj.bias": torch.arange(64.0),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(256, 128),
        "lm_head.weight": head,
    }
    rows = write_gguf(tmp_path / "m.gguf", source, overrides=overrides, embedding_type="BF16", output_type="F16")
    written = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.array_equal(written["output_norm.weight"].data, np.full(128, 3.0, np.float32))
    assert np.array_equal(written["blk.1.attn_k.bias"].data, np.arange(64, dtype=np.float32))
    assert not written["blk.0.ffn_up.weight"].data.any()
    assert np.array_equal(written["output.weight"].data, head.half().numpy())
    assert {row.name: row.type for row in rows}["token_embd.weight"] == "BF16"
    assert check_gguf(tmp_path / "m.gguf", source, None, overrides) == len(rows)
    with pytest.raises(HalfbyteError, match="missing or unexpected"):
        check_gguf(tmp_path / "m.gguf", source)
    with open_engine().load(tmp_path / "m.gguf", n_ctx=32) as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()


def test_metadata_and_name(tiny, tmp_path):
    source = tiny("qwen2")
    values = {"plan.hash": "abc", "halfbyte.seed": 2**40, "kl": 0.1, "ok": True, "empty": ""}
    write_gguf(tmp_path / "m.gguf", source, metadata=values, **F16)
    found = keys(tmp_path / "m.gguf")
    expected = {"plan.hash": "abc", "seed": 2**40, "kl": 0.1, "ok": True, "empty": ""}
    assert {key: found[f"halfbyte.{key}"] for key in expected} == expected
    assert found["general.name"] == source.origin.folder.rpartition("/")[2]
    assert found["general.architecture"] == "qwen2"
    assert found["general.quantization_version"] == 2


def test_progress_counts_every_tensor(tiny, tmp_path):
    seen = []
    with listening(seen.append):
        rows = write_gguf(tmp_path / "m.gguf", tiny("llama"))
    assert [step.done for step in seen] == list(range(1, len(rows) + 1))
    assert all((step.stage, step.total) == ("export", len(rows)) for step in seen)


def test_chunks_make_the_same_file(tiny, tmp_path, monkeypatch):
    source = tiny("llama")
    write_gguf(tmp_path / "whole.gguf", source, weights=codes_of(source))
    monkeypatch.setattr(gguf_tensors, "CHUNK_ELEMENTS", 1000)
    write_gguf(tmp_path / "parts.gguf", source, weights=codes_of(source))
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()
    assert check_gguf(tmp_path / "whole.gguf", source, codes_of(source)) == 21


def test_the_encoded_file_is_never_held_in_memory(tiny, tmp_path):
    source = tiny("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    tracemalloc.start()
    write_gguf(tmp_path / "m.gguf", source, **F16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "m.gguf").stat().st_size > 20e6
    assert peak < 5e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_types": {"model.layers.9.mlp.up_proj": "F16"}}, "no such layer"),
        ({"layer_types": {"model.layers.0.mlp.up_proj": "IQ1_S"}}, r"layers\.0\.mlp\.up_proj.*unknown tensor type"),
        ({"embedding_type": "nonsense"}, r"embed_tokens.*unknown tensor type"),
        ({"overrides": {"model.norm.bias": torch.zeros(128)}}, "does not have"),
        ({"overrides": {"model.norm.weight": torch.zeros(64)}}, "another shape"),
    ],
)
def test_wrong_requests_are_refused_before_writing(tiny, tmp_path, arguments, message):
    with pytest.raises(HalfbyteError, match=message):
        write_gguf(tmp_path / "m.gguf", tiny("llama"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_cannot_be_q4_0_are_named_before_writing(tiny, tmp_path):
    source = tiny("llama")
    good = codes_of(source)
    name = "model.layers.1.mlp.down_proj"
    fine = round_to_nearest(source.model.get_submodule(name).weight, 16).pack()
    with pytest.raises(HalfbyteError, match=r"layers\.1\.mlp\.down_proj.*multiple of 32"):
        write_gguf(tmp_path / "m.gguf", source, weights={**good, name: fine})
    with pytest.raises(HalfbyteError, match=r"layers\.1\.mlp\.down_proj.*do not fit"):
        write_gguf(tmp_path / "m.gguf", source, weights={**good, name: good["model.layers.1.mlp.up_proj"]})
    with pytest.raises(HalfbyteError, match="no such layer"):
        write_gguf(tmp_path / "m.gguf", source, weights={"lm_head": good[name]})
    assert list(tmp_path.iterdir()) == []
    odd = tiny("qwen2", hidden_size=80, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(HalfbyteError, match=r"embed_tokens.*multiple of 32"):
        write_gguf(tmp_path / "odd.gguf", odd)


def test_fp16_overflow_is_an_error_and_leaves_nothing(tiny, tmp_path):
    source = tiny("qwen2")
    name = "model.layers.1.mlp.down_proj.weight"
    large = dict(source.model.named_parameters())[name].clone()
    large[3, 5] = 70000.0
    with pytest.raises(HalfbyteError, match=r"down_proj.*65504.*70000"):
        write_gguf(tmp_path / "m.gguf", source, overrides={name: large})
    assert list(tmp_path.iterdir()) == []
    write_gguf(tmp_path / "m.gguf", source, overrides={name: large}, layer_types={name.removesuffix(".weight"): "BF16"})


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_keeps_the_old_file(tiny, tmp_path, failure):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"before")

    def listen(step):
        if step.done == 5:
            raise failure

    with listening(listen), pytest.raises((HalfbyteError, KeyboardInterrupt)) as caught:
        write_gguf(path, tiny("llama"))
    if isinstance(failure, OSError):
        assert "disk is full" in str(caught.value)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_too_little_disk_space_is_said_before_writing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("halfbyte.core.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(HalfbyteError, match="disk is too small"):
        write_gguf(tmp_path / "m.gguf", tiny("llama"))


def test_check_sees_a_flipped_bit_and_other_codes(tiny, tmp_path):
    source, path = tiny("llama"), tmp_path / "m.gguf"
    weights = codes_of(source)
    write_gguf(path, source, weights=weights)
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(path.read_bytes())
    data[tensor.data_offset + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(HalfbyteError, match=r"blk\.1\.ffn_down\.weight.*differs"):
        check_gguf(path, source, weights)
    path.write_bytes(data[: tensor.data_offset])
    with pytest.raises(HalfbyteError, match="truncated"):
        check_gguf(path, source, weights)


@pytest.mark.slow
def test_demo_from_its_gguf(tmp_path):
    source = load(find("demo"), device=torch.device("cpu"), dtype=torch.float32)
    write_gguf(tmp_path / "f16.gguf", source, **F16)
    ids = torch.tensor(source.tokenizer.encode("The capital of France is Paris, and the capital of Italy is"))
    assert kl_of_llamacpp(tmp_path / "f16.gguf", ids, logits_of(source.model, ids)) < 1e-4
    assert check_gguf(tmp_path / "f16.gguf", source) == 272
    copied, original = keys(tmp_path / "f16.gguf"), keys(source.origin.gguf_file)
    changed = {key for key in original if copied.get(key) != original[key]} - {"GGUF.kv_count"}
    assert changed == {"general.file_type"}
    with open_engine().load(tmp_path / "f16.gguf", n_ctx=128) as model:
        assert "Paris" in model.generate("What is the capital of France?", 24).text
