"""Tokenizers: llama.cpp must cut text into the same tokens as transformers."""

import json

import pytest
import torch
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from halfbyte.core.errors import HalfbyteError
from halfbyte.engines import open_engine
from halfbyte.models.gguf_source import PRE_TOKENIZERS, pre_tokenizer_name
from halfbyte.models.loading import find, load
from halfbyte.targets.gguf_files.writer import write_gguf
from tests.tiny_models import CHAT_TEMPLATE, TEXTS, keys, random_texts

STYLES = ["qwen2", "llama-bpe", "smollm", "gpt-2", "tekken", "sentencepiece"]
MARKED = [
    "<|im_start|>user\nhi 12<|im_end|>\n<tool_call>{}<|fim_prefix|>x",
    "<|begin_of_text|>Hi there<|eot_id|> again",
    "<s>a b</s> c",
]


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    """(loaded source, GGUF file) of a tiny Llama with a tokenizer of a style."""
    made = {}

    def get(style):
        if style not in made:
            folder = tiny_folder("llama", tokenizer=style)
            source = load(find(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
            path = tmp_path_factory.mktemp("vocab") / f"{style}.gguf"
            write_gguf(path, source)
            made[style] = source, path
        return made[style]

    return get


def composed(text, style):
    """Qwen's tokenizer composes characters first (NFC); llama.cpp does not, so the comparison does."""
    return normalizers.NFC().normalize_str(text) if style == "qwen2" else text


@pytest.mark.parametrize("style", STYLES)
def test_llamacpp_tokenises_as_transformers(exported, style):
    source, path = exported(style)
    with open_engine().load(path, n_ctx=32) as model:
        for text in [composed(text, style) for text in TEXTS + MARKED + random_texts(500)]:
            assert model.tokenize(text, special=True) == source.tokenizer.encode(text, add_special_tokens=False), text
        begins = source.tokenizer.encode("a")[:1] == [source.tokenizer.bos_token_id]
        assert model.adds_bos == begins == (style in ("llama-bpe", "sentencepiece"))


@pytest.mark.parametrize("style", STYLES)
def test_keys(exported, style):
    source, path = exported(style)
    found = keys(path)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert found["tokenizer.ggml.pre"] == ("default" if style == "sentencepiece" else style)
    assert found["tokenizer.ggml.model"] == ("llama" if style == "sentencepiece" else "gpt2")
    assert len(tokens) == len(types) == source.config.vocab_size
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert types.count(TokenType.UNUSED) == 24
    assert found["tokenizer.ggml.eos_token_id"] == source.tokenizer.eos_token_id
    assert types[source.tokenizer.eos_token_id] == TokenType.CONTROL
    if style == "sentencepiece":
        assert types[0] == TokenType.UNKNOWN
        assert types[3:259] == [TokenType.BYTE] * 256
        assert found["tokenizer.ggml.add_space_prefix"] is True
    else:
        assert "tokenizer.ggml.merges" in found
        assert found["tokenizer.chat_template"] == CHAT_TEMPLATE
    if style == "qwen2":
        kinds = {text: kind for text, kind in zip(tokens, types, strict=True) if text.startswith("<")}
        assert kinds["<tool_call>"] == TokenType.USER_DEFINED
        assert kinds["<|fim_prefix|>"] == kinds["<|im_start|>"] == TokenType.CONTROL
        assert "tokenizer.ggml.bos_token_id" not in found
        assert found["tokenizer.ggml.padding_token_id"] == source.tokenizer.pad_token_id


def test_named_chat_templates(tiny, tmp_path):
    source = tiny("qwen2-tied")
    source.tokenizer.chat_template = {"default": "first", "tool_use": "second"}
    write_gguf(tmp_path / "m.gguf", source)
    source.tokenizer.chat_template = CHAT_TEMPLATE
    found = keys(tmp_path / "m.gguf")
    assert found["tokenizer.chat_template"] == "first"
    assert found["tokenizer.chat_template.tool_use"] == "second"


def as_json(*steps):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return json.loads(tokenizer.to_str())["pre_tokenizer"]


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize("name", list(PRE_TOKENIZERS))
def test_every_known_pre_tokenizer_is_found_by_its_splits(name):
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in PRE_TOKENIZERS[name]]
    assert pre_tokenizer_name(as_json(*splits, BYTES)) == name


def test_llama3_pattern_as_published():
    published = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    assert pre_tokenizer_name(as_json(pre_tokenizers.Split(Regex(published), "isolated"), BYTES)) == "llama-bpe"


@pytest.mark.parametrize(
    ("steps", "quoted"),
    [
        ([pre_tokenizers.Split(Regex(r"\p{Han}+"), "isolated"), BYTES], r"\\p\{Han\}"),
        ([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)], "Digits"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], "add_prefix_space"),
        ([pre_tokenizers.Split(Regex(r"\p{N}"), "removed"), BYTES], "Removed"),
        ([BYTES], "none"),
    ],
)
def test_an_unknown_pre_tokenizer_is_quoted(steps, quoted):
    with pytest.raises(HalfbyteError, match=f"no llama.cpp pre-tokenizer.*{quoted}"):
        pre_tokenizer_name(as_json(*steps), where="m")


def refusal(tiny, tmp_path, change):
    """What write_gguf says about a tiny Qwen2 whose tokenizer was changed."""
    source = load(tiny("qwen2-tied").origin, device=torch.device("cpu"), dtype=torch.float32)
    change(source)
    with pytest.raises(HalfbyteError) as caught:
        write_gguf(tmp_path / "m.gguf", source)
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


def test_tokenizers_that_gguf_cannot_describe_are_refused(tiny, tmp_path):
    def unigram(source):
        source.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0)))

    def lowercase(source):
        source.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    def more_tokens(source):
        source.tokenizer.add_tokens([f"extra{index}" for index in range(100)])

    def odd_prefix(source):
        name = "<|im_start|>"
        special = [(name, source.tokenizer.convert_tokens_to_ids(name))]
        source.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", special_tokens=special
        )

    assert "got Unigram" in refusal(tiny, tmp_path, unigram)
    assert "Lowercase" in refusal(tiny, tmp_path, lowercase)
    assert "more tokens than the model has embeddings" in refusal(tiny, tmp_path, more_tokens)
    assert "adds special tokens" in refusal(tiny, tmp_path, odd_prefix)


@pytest.mark.slow
def test_demo_through_a_folder_keeps_the_tokenizer_of_its_gguf(tmp_path):
    demo = load(find("demo"), device=torch.device("cpu"), dtype=torch.bfloat16)
    # SmolLM2's own tokenizer.json has this; the conversion from GGUF may have lost the digits.
    demo.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    folder = tmp_path / "SmolLM2"
    demo.model.save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)
    source = load(find(str(folder)), device=torch.device("cpu"), dtype=torch.bfloat16)
    write_gguf(tmp_path / "m.gguf", source)
    found, original = keys(tmp_path / "m.gguf"), keys(demo.origin.gguf_file)
    copied = {key for key in original if key.startswith("tokenizer.")}
    for key in copied - {"tokenizer.ggml.add_space_prefix"}:  # of no meaning to a byte-level tokenizer
        assert found[key] == original[key], key
    with open_engine().load(tmp_path / "m.gguf", n_ctx=128) as model:
        for text in TEXTS:
            assert model.tokenize(text) == source.tokenizer.encode(text, add_special_tokens=False), text
        assert "Paris" in model.generate("What is the capital of France?", 24).text
