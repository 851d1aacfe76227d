"""The tokenizer of a Hugging Face model as ``tokenizer.*`` keys of a GGUF file.

Two kinds exist in the supported families: byte-level BPE (GPT-2's, llama.cpp model ``gpt2``) and SentencePiece BPE with
byte tokens (Llama-2's, llama.cpp model ``llama``). Source of the keys: the GGUF specification (ggml, docs/gguf.md) and
what llama.cpp's llama-vocab.cpp reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.gguf_pre import pre_tokenizer_name

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
