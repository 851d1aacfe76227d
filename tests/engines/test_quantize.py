"""llama.cpp's file types: the recipes, importance matrices, and the same bytes from both bindings."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.engines import ENGINES, open_engine
from halfbyte.engines.llamacpp import Engine
from halfbyte.engines.llamacpp.quantize import read_importance
from halfbyte.quant.ggml.ftypes import FILE_TYPES, Shape, tensor_type
from tests.tiny_gguf import BLOCKS, WIDTH


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_q4_k_m(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    assert engine.quantize(tiny, target, "Q4_K_M") == ()
    found = types_in(target)
    assert [found[f"blk.{block}.ffn_down.weight"] for block in range(BLOCKS)] == ["Q4_K", "Q4_K", "Q6_K"]
    assert [found[f"blk.{block}.attn_v.weight"] for block in range(BLOCKS)] == ["Q4_K", "Q4_K", "Q6_K"]
    assert found["blk.2.attn_q.weight"] == "Q4_K"
    assert found["token_embd.weight"] == "Q6_K"  # it is the output matrix too
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert gguf.GGUFReader(target).get_field("general.file_type").contents() == 15
    assert target.stat().st_size < tiny.stat().st_size / 5
    with engine.load(target, n_ctx=16) as small, engine.load(tiny, n_ctx=16) as large:
        got, expected = small.logits([1, 2, 3, 4]), large.logits([1, 2, 3, 4])
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.95


def test_which_blocks_get_more_bits() -> None:
    shape = Shape("llama", n_blocks=17, n_heads=8, n_kv_heads=8, tied=False, has_imatrix=False)

    def blocks(file_type: str, kind: str, shape: Shape = shape) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for block in range(shape.n_blocks):
            chosen = tensor_type(file_type, f"blk.{block}.{kind}.weight", 4096, shape)[1].name
            found.setdefault(chosen, []).append(block)
        return found

    assert blocks("Q4_K_M", "ffn_down")["Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15, 16]
    assert blocks("Q4_K_S", "attn_v")["Q5_K"] == [0, 1, 2, 3]
    assert blocks("Q3_K_M", "ffn_down")["Q5_K"] == [0]
    assert blocks("IQ4_XS", "ffn_down")["Q5_K"] == [0, 1]
    assert blocks("IQ4_XS", "ffn_down", replace(shape, has_imatrix=True)) == {"IQ4_XS": list(range(17))}
    assert blocks("Q4_0", "ffn_down", replace(shape, has_imatrix=True))["Q4_1"] == [0, 1]
    assert blocks("Q2_K", "attn_v", replace(shape, n_kv_heads=2)) == {"Q4_K": list(range(17))}
    assert blocks("Q4_K_M", "attn_v", replace(shape, n_blocks=80, n_kv_heads=2)).keys() == {"Q6_K", "Q5_K"}
    with pytest.raises(HalfbyteError, match="dense transformers only"):
        tensor_type("Q4_0", "blk.0.ffn_gate_exps.weight", 4096, shape)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_loads(tiny: Path, tmp_path: Path, file_type: str) -> None:
    open_engine().quantize(tiny, tmp_path / "q.gguf", file_type)
    with open_engine().load(tmp_path / "q.gguf", n_ctx=16) as loaded:
        assert np.isfinite(loaded.logits([1, 2, 3])).all()


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_both_engines_write_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    matrices = [tensor for tensor in gguf.GGUFReader(tiny).tensors if len(tensor.shape) == 2]
    values = {tensor.name: rng.random(tensor.shape[0]) + 0.01 for tensor in matrices}
    for file_type, imatrix in itertools.product(FILE_TYPES, (None, values)):
        for engine in ENGINES:
            open_engine(engine).quantize(tiny, tmp_path / engine, file_type, imatrix=imatrix)
        ours, theirs = (gguf.GGUFReader(tmp_path / engine).tensors for engine in ENGINES)
        found = {tensor.name: tensor for tensor in theirs}
        for tensor in ours:
            message = f"{tensor.name} in {file_type}, {'without' if imatrix is None else 'with'} importance"
            assert tensor.tensor_type == found[tensor.name].tensor_type, message
            np.testing.assert_array_equal(tensor.data, found[tensor.name].data, err_msg=message)


def test_rows_that_do_not_divide_fall_back() -> None:
    shape = Shape("llama", n_blocks=30, n_heads=9, n_kv_heads=3, tied=True, has_imatrix=False)
    pairs = {
        (file_type, name): tuple(kind.name for kind in tensor_type(file_type, name, 576, shape))
        for file_type in ("Q4_K_M", "Q3_K_M", "IQ4_XS", "Q4_0", "F16")
        for name in ("blk.5.attn_q.weight", "token_embd.weight")
    }
    assert pairs["Q4_K_M", "blk.5.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert pairs["Q3_K_M", "blk.5.attn_q.weight"] == ("Q3_K", "Q4_0")
    assert pairs["IQ4_XS", "blk.5.attn_q.weight"] == ("IQ4_XS", "IQ4_NL")
    assert pairs["Q4_0", "token_embd.weight"] == ("Q6_K", "Q8_0")
    assert pairs["F16", "token_embd.weight"] == ("F16", "F16")
    assert tensor_type("Q4_0", "blk.0.attn_q.weight", 100, shape)[1].name == "F16"


def test_importance_changes_the_codes_and_is_checked(tiny: Path, tmp_path: Path) -> None:
    name, plain, weighted, matrix = "blk.2.attn_q.weight", tmp_path / "p", tmp_path / "w", tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(matrix, "llama")
    writer.add_type("imatrix")
    sums = np.linspace(0.1, 90, WIDTH, dtype=np.float32).reshape(1, -1)
    writer.add_tensor(f"{name}.in_sum2", sums)
    writer.add_tensor(f"{name}.counts", np.full((1, 1), 3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_allclose(read_importance(matrix)[name], sums[0] / 3, rtol=1e-6)

    engine = open_engine()
    engine.quantize(tiny, plain, "Q4_K_S")
    outcomes = engine.quantize(tiny, weighted, "Q4_K_S", imatrix=matrix)
    assert name not in {outcome.layer for outcome in outcomes}
    assert {outcome.note for outcome in outcomes} == {"no importance values"}
    before = {t.name: t.data for t in gguf.GGUFReader(plain).tensors}
    after = {t.name: t.data for t in gguf.GGUFReader(weighted).tensors}
    assert not np.array_equal(before[name], after[name])
    np.testing.assert_array_equal(before["blk.1.attn_q.weight"], after["blk.1.attn_q.weight"])
    with pytest.raises(HalfbyteError, match="does not fit"):
        engine.quantize(tiny, tmp_path / "x", "Q4_0", imatrix={name: np.ones(7)})
    with pytest.raises(HalfbyteError, match="not finite"):
        engine.quantize(tiny, tmp_path / "x", "Q4_0", imatrix={name: np.full(WIDTH, np.nan)})
    with pytest.raises(HalfbyteError, match="negative"):
        engine.quantize(tiny, tmp_path / "x", "Q4_0", imatrix={name: np.full(WIDTH, -1.0)})
    with pytest.raises(HalfbyteError, match="not an importance matrix"):
        engine.quantize(tiny, tmp_path / "x", "Q4_0", imatrix=plain)
    assert not (tmp_path / "x").exists()


def test_quantize_refuses(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    target, broken = tmp_path / "out.gguf", tmp_path / "broken.gguf"
    with pytest.raises(HalfbyteError, match=r"unknown file type.*Q4_K_M"):
        engine.quantize(tiny, target, "Q4_K_XL")
    with pytest.raises(HalfbyteError, match="no such file"):
        engine.quantize(tmp_path / "none.gguf", target, "Q4_0")
    with pytest.raises(HalfbyteError, match="same file"):
        engine.quantize(tiny, tiny, "Q4_0")
    whole = tiny.read_bytes()
    for size in (10, 1500, len(whole) // 2, len(whole) - 40):
        broken.write_bytes(whole[:size])
        with pytest.raises(HalfbyteError, match=r"truncated or corrupt|cannot quantise") as caught:
            engine.quantize(broken, target, "Q4_0")
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


@pytest.mark.slow
def test_smollm2_as_q4_k_m(smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "SmolLM2.Q4_K_M.gguf"
    outcomes = open_engine().quantize(smollm2, target, "Q4_K_M")
    assert {(outcome.asked, outcome.done) for outcome in outcomes} == {("Q4_K", "Q5_0"), ("Q6_K", "Q8_0")}
    assert "576" in outcomes[0].note
    assert target.stat().st_size == 105454144  # what llama_model_quantize writes; larger than Q4_1 for the fallbacks
    with open_engine().load(target) as loaded:
        assert "Paris" in loaded.generate("The capital of France is", 8, chat=False).text
