"""What llama.cpp must know beside the weights: the architecture from a Hugging Face config, and the tokenizer.

Two kinds of tokenizer exist in the supported families: byte-level BPE (GPT-2's, llama.cpp model ``gpt2``) and
SentencePiece BPE with byte tokens (Llama-2's, llama.cpp model ``llama``). What a GGUF source has is copied. Source of
the keys: the GGUF specification (ggml, docs/gguf.md) and what llama.cpp's llama-model.cpp and llama-vocab.cpp read.
Rotary scaling follows ``transformers.modeling_rope_utils``, which the simulation runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, RopeScalingType, TokenType
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.gguf_source import pre_tokenizer_name
from halfbyte.models.modules import head_dim

ROPE_FREQS = "rope_freqs.weight"
# About the file that was read, not about the model; the writer says its own. The reader shows the header as `GGUF.`.
NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
NOT_COPIED += ("split.", "quantize.", "halfbyte.")
YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # these graphs do not read the keys for them


def copy_keys_(writer: GGUFWriter, reader: GGUFReader) -> None:
    """Copy the metadata of a GGUF file, architecture and tokenizer included, byte for byte."""
    for key, field in reader.fields.items():
        if key.startswith(NOT_COPIED):
            continue
        kind, element = field.types[0], field.types[-1]
        if kind == GGUFValueType.ARRAY:
            if len(field.data) == 0:  # the writer has no empty arrays; a missing key means the same
                continue
            parts = [field.parts[index] for index in field.data]
            value: Any = [bytes(part) if element == GGUFValueType.STRING else part[0].item() for part in parts]
            writer.add_key_value(key, value, kind, sub_type=element)
        elif kind == GGUFValueType.STRING:
            writer.add_key_value(key, bytes(field.parts[-1]), kind)
        else:
            writer.add_key_value(key, field.contents(), kind)


def add_hparams_(writer: GGUFWriter, config: PretrainedConfig, *, where: object) -> None:
    """Add the architecture keys of ``config`` to ``writer``, under the writer's ``general.architecture``.

    A sliding window is written, but llama.cpp's llama and qwen graphs attend to the whole context: they agree with
    the model up to that many tokens.

    Raises:
        HalfbyteError: an activation function or a rotary scaling that llama.cpp does not compute for these families.
    """
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise HalfbyteError(f"{where}: activation function is not llama.cpp's, expected silu, got {activation}")
    head = head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if writer.arch == "qwen3" or head * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(window)
    _add_rope_(writer, config, where)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _add_rope_(writer: GGUFWriter, config: PretrainedConfig, where: object) -> None:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _add_yarn_(writer, config, rope, where)
    elif kind != "default" and not (kind == "llama3" and writer.arch == "llama"):  # a tensor, rope_frequency_factors
        known = "default, linear, yarn" + (" or llama3" if writer.arch == "llama" else "")
        raise HalfbyteError(
            f"{where}: llama.cpp's {writer.arch} has no such rotary scaling, expected {known}, got {kind}"
        )


def _add_yarn_(writer: GGUFWriter, config: PretrainedConfig, rope: dict[str, Any], where: object) -> None:
    """YaRN (https://arxiv.org/abs/2309.00071). llama.cpp multiplies its own 0.1 ln s + 1 by ``attn_factor``."""
    unread = {key: rope.get(key) for key, usual in YARN_FIXED.items() if rope.get(key) not in (None, usual)}
    if unread:
        raise HalfbyteError(f"{where}: llama.cpp has its own YaRN constants, expected {YARN_FIXED}, got {unread}")
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))[1]
    usual = 0.1 * math.log(factor) + 1.0
    if not math.isclose(attention, usual, rel_tol=1e-6):
        writer.add_rope_scaling_attn_factors(attention / usual)


def rope_frequency_factors(config: PretrainedConfig) -> torch.Tensor | None:
    """The tensor ``rope_freqs.weight``, fp32 ``[rotary dims / 2]``, by which llama.cpp divides each rotary frequency.

    Only Llama 3's scaling needs it; None otherwise.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].float()  # [dims / 2]
    dims = 2 * scaled.numel()
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    return plain / scaled


PADDING_SCORE = -1000.0  # of tokens that no merge makes
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>")  # chat markup that some tokenizers forget to mark as special
_META = "▁"


def add_tokenizer_(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, *, where: object
) -> None:
    """Add every ``tokenizer.*`` key; ids that no token has, up to ``config.vocab_size``, become unused tokens.

    Raises:
        HalfbyteError: not a BPE that llama.cpp can run, a pre-tokenizer without a name there, more tokens than the
            model has embeddings, or special tokens that are added in a way GGUF has no key for.
    """
    state = _tokenizer_json(tokenizer, where)
    if state["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space_prefix(state, where))
    else:
        _check_normalizer(state, where)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(state["pre_tokenizer"], where=where))
    tokens, types = _tokens(state, tokenizer, config, where)
    writer.add_token_list(tokens)
    if state["model"].get("byte_fallback"):
        writer.add_token_scores(_scores(state, tokens, types))
    else:
        writer.add_token_merges([" ".join(pair) for pair in _merges(state)])
    writer.add_token_types(types)
    _add_special_ids_(writer, tokenizer, config, where)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase, where: object) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    kind = state.get("model", {}).get("type")
    if kind != "BPE":
        got = kind or type(tokenizer).__name__
        raise HalfbyteError(f"{where}: tokenizer cannot be written to GGUF, expected a BPE tokenizer.json, got {got}")
    return state


def _tokens(
    state: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, where: object
) -> tuple[list[str], list[int]]:
    """Text and type of every id, ``[vocab_size]`` each."""
    by_id: dict[int, str] = {index: text for text, index in state["model"]["vocab"].items()}
    added: dict[int, dict[str, Any]] = {entry["id"]: entry for entry in state["added_tokens"]}
    by_id.update({index: entry["content"] for index, entry in added.items()})
    size = config.vocab_size
    if max(by_id) >= size:
        raise HalfbyteError(
            f"{where}: tokenizer has more tokens than the model has embeddings, "
            f"expected at most {size}, got {max(by_id) + 1}",
            fix="resize the model's embeddings to the tokenizer",
        )
    sentencepiece = bool(state["model"].get("byte_fallback"))
    unknown = state["model"].get("unk_token") or (tokenizer.unk_token if sentencepiece else None)
    tokens, types = [], []
    for index in range(size):
        text = by_id.get(index, f"[PAD{index}]")
        kind = TokenType.NORMAL
        if index not in by_id:
            kind = TokenType.UNUSED
        elif sentencepiece and text == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            special = added[index]["special"] or _LOOKS_SPECIAL.fullmatch(text)
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        elif sentencepiece and _BYTE_TOKEN.fullmatch(text):
            kind = TokenType.BYTE
        if kind == TokenType.USER_DEFINED and sentencepiece:
            text = text.replace(_META, " ")  # llama.cpp looks for these before it replaces spaces
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _merges(state: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in state["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _scores(state: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """SentencePiece scores that make llama.cpp merge in the order of the merges: what is made first scores highest."""
    order: dict[str, int] = {}
    for left, right in _merges(state):
        order.setdefault(left + right, len(order))
    plain = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)
    rank = {text: -float(position) for text, position in order.items()}
    lowest = -float(len(order)) + PADDING_SCORE
    return [0.0 if kind in plain else rank.get(text, lowest) for text, kind in zip(tokens, types, strict=True)]


def _adds_space_prefix(state: dict[str, Any], where: object) -> bool:
    """Whether a space is put before the text, from the normalizer or the pre-tokenizer of a SentencePiece BPE.

    llama.cpp also puts one after each special token: so does the Prepend normalizer, but not a Metaspace that says
    "first". GGUF has no key for the difference.
    """
    normalizer = state["normalizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if state["pre_tokenizer"] is not None:
        steps = [*steps, state["pre_tokenizer"]]
    unknown = [step["type"] for step in steps if step["type"] not in ("Prepend", "Replace", "Metaspace")]
    if unknown:
        raise HalfbyteError(f"{where}: tokenizer step has no counterpart in llama.cpp, got {', '.join(unknown)}")
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def _check_normalizer(state: dict[str, Any], where: object) -> None:
    """llama.cpp normalises no text for byte-level BPE; Qwen's NFC changes nothing in text that is composed already."""
    normalizer = state["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC" and normalizer.get("normalizers") != []:
        raise HalfbyteError(f"{where}: normalizer is not llama.cpp's, expected NFC or none, got {normalizer}")


def _add_special_ids_(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, where: object
) -> None:
    ids: dict[str, int] = {}
    for kind in ("bos", "eos", "unk", "pad"):
        found = getattr(tokenizer, f"{kind}_token_id", None)
        found = getattr(config, f"{kind}_token_id", None) if found is None else found
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int) and 0 <= found < config.vocab_size:
            ids[kind] = found
            getattr(writer, f"add_{kind}_token_id")(found)
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts, ends = full[:1] == [ids.get("bos")] != plain[:1], full[-1:] == [ids.get("eos")] != plain[-1:]
    if full != [ids.get("bos")] * starts + plain + [ids.get("eos")] * ends:
        raise HalfbyteError(
            f"{where}: tokenizer adds special tokens that GGUF has no key for, "
            f"expected bos before, eos after, got {tokenizer.convert_ids_to_tokens(full)}"
        )
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
