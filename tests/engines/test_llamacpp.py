"""llama.cpp through both bindings: a tiny made-up model for the contract, the real SmolLM2 file for the sense of it."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.engines import llama_cpp_python, open_engine, xllamacpp
from halfbyte.engines.llamacpp import Engine, Generation, GGUFModel, Speed
from halfbyte.engines.llamacpp.model import render
from tests.tiny_gguf import VOCAB
from tests.tiny_models import CHAT_TEMPLATE


@pytest.fixture
def model(engine: Engine, tiny: Path):
    with engine.load(tiny, n_ctx=64, n_threads=1) as loaded:
        yield loaded


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
        assert "got None" not in str(caught.value)
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
    code = f"from halfbyte.engines import open_engine\nm = open_engine().load({str(tiny)!r})\nm.logits([1, 2])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_loads_no_library() -> None:
    code = (
        "import sys, halfbyte.engines.llamacpp\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'xllamacpp' not in maps and 'xllamacpp' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Engines


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_engine() is open_engine("xllamacpp")
    assert open_engine().version.startswith("xllamacpp 20")
    with pytest.raises(HalfbyteError, match="expected one of llama-cpp-python, xllamacpp"):
        open_engine("vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HalfbyteError, match=r"pip install xllamacpp==2026"):
        xllamacpp.load.__wrapped__()
    with pytest.raises(HalfbyteError, match="pip install llama-cpp-python"):
        llama_cpp_python.load()


def test_a_library_without_the_c_functions_names_the_other_engine() -> None:
    with pytest.raises(HalfbyteError, match=r"does not export llama_backend_init.*llama-cpp-python"):
        xllamacpp.bind(types.SimpleNamespace(), where="xllamacpp 1.0")


def test_another_struct_layout_is_refused() -> None:
    params = xllamacpp.load().llama_context_default_params()
    xllamacpp.check_defaults(params, xllamacpp._CONTEXT_PARAMS, where="here")
    for field, value in (("n_batch", 512), ("flash_attn_type", 0), ("kv_unified", True)):
        other = type(params).from_buffer_copy(params)
        setattr(other, field, value)
        with pytest.raises(HalfbyteError, match=rf"llama_context_params\.{field}.*pip install"):
            xllamacpp.check_defaults(other, xllamacpp._CONTEXT_PARAMS, where="here")


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
    fake.__dict__.update(vars(xllamacpp.load()))
    fake.__dict__.update(
        __version__="0.0.1",
        __spec__=ModuleSpec("llama_cpp", None),
        llama_log_set=lambda callback, data: None,  # the library is shared, and its log already taken care of
        llama_model_quantize_default_params=types.SimpleNamespace,
        llama_model_quantize=quantize,
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setattr(ctypes, "byref", lambda params: params)
    other = Engine("llama-cpp-python", "0.0.1", llama_cpp_python.load())
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
        llama_cpp_python.load()


# The real model


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


# Chat templates


QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- messages[0]['content'] }}\n{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content }}\n"
    "    {{- '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
LLAMA = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("template", [QWEN, LLAMA, CHAT_TEMPLATE, "{{ messages | tojson }} {{ tools is none }}"])
def test_same_text_as_transformers(template, tokenizers_by_style):
    tokenizer = tokenizers_by_style("llama-bpe")
    messages = [{"role": "user", "content": "Größe <b> & 'x'?"}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    got = render(template, messages[0]["content"], bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    assert got == expected


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[5].content.x }}"])
def test_a_broken_template_gives_none(template):
    assert render(template, "hello", bos="", eos="") is None


def test_a_template_cannot_reach_the_machine():
    assert render("{{ ''.__class__.__mro__[1].__subclasses__() }}", "x", bos="", eos="") is None
