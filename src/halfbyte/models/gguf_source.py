"""A GGUF file as a source of weights: its tensors dequantised under Hugging Face names, its tokenizer with its splits.

Source of the layout: the GGUF specification in the ggml repository (docs/gguf.md), read with the ``gguf`` package.

A byte-level BPE first cuts text with regular expressions and merges bytes inside the pieces. A GGUF file does not
carry the expressions, only a name that llama.cpp knows (``tokenizer.ggml.pre``, llama-vocab.cpp). For an export the
name is found by comparing the expressions in ``tokenizer.json`` with those that stand behind each name. An unknown one
is an error: a near miss would run, and worsen every answer a little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from halfbyte.core.errors import HalfbyteError, reading
from halfbyte.core.files import cache_folder, scratch_folder, sha256
from halfbyte.models.families import Family
from halfbyte.models.gguf_file import gguf_keys

CONVERSION = 2  # of cached folders: raised when their content changes

Step = str | tuple[Any, ...]  # a regex whose matches become pieces, or the description of something else

DIGIT = r"\p{N}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTION_SPELT_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = _CONTRACTION + _WORD + r"\p{N}" + _REST
LLAMA3 = _CONTRACTION + _WORD + r"\p{N}{1,3}" + _REST
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# name in llama.cpp -> the splits behind it, in order. SmolLM2's structure is also StarCoder's and Granite's.
PRE_TOKENIZERS: dict[str, tuple[Step, ...]] = {
    "qwen2": (QWEN2,),
    "llama-bpe": (LLAMA3,),
    "tekken": (TEKKEN,),
    "smollm": (DIGIT, GPT2),
    "gpt-2": (GPT2,),
}
_OTHER_SPELLINGS = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    QWEN2.replace(_CONTRACTION, _CONTRACTION_SPELT_OUT): QWEN2,
    LLAMA3.replace(_CONTRACTION, _CONTRACTION_SPELT_OUT): LLAMA3,
}


def config_and_tokenizer_folder(path: Path) -> Path:
    """A folder with ``config.json`` and the tokenizer of a GGUF file, converted once, cached by digest."""
    folder = cache_folder() / f"gguf-v{CONVERSION}" / sha256(path)[:16]
    if (folder / "config.json").exists():
        return folder
    keys = gguf_keys(path)
    arch = keys.get("general.architecture")
    scaling = keys.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise HalfbyteError(
            f"{path}: rope scaling of a GGUF source is not supported, got {scaling}",
            fix="start from the Hugging Face model",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent) as scratch, reading(path, "configuration or tokenizer"):
        partial = scratch / "model"
        partial.mkdir()
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if f"{arch}.attention.key_length" in keys:
            config.head_dim = int(keys[f"{arch}.attention.key_length"])
        if keys.get("tokenizer.ggml.model") == "gpt2":
            tokenizer.backend_tokenizer.pre_tokenizer = _pre_tokenizer(str(keys.get("tokenizer.ggml.pre")), path)
        tokenizer.save_pretrained(partial)
        config.save_pretrained(partial)
        with suppress(OSError):  # another process was first
            partial.rename(folder)
    return folder


def _pre_tokenizer(name: str, path: Path) -> pre_tokenizers.PreTokenizer:
    """The splits that llama.cpp makes; transformers' own conversion leaves some of them out (smollm's digits)."""
    if name not in PRE_TOKENIZERS:
        raise HalfbyteError(
            f"{path}: pre-tokenizer is unknown, expected {', '.join(PRE_TOKENIZERS)}, got {name}",
            fix="start from the Hugging Face model",
        )
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in PRE_TOKENIZERS[name] if isinstance(step, str)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer_name(pre_tokenizer: Mapping[str, Any] | None, *, where: object = "tokenizer") -> str:
    """llama.cpp's name for the ``pre_tokenizer`` object of a ``tokenizer.json``.

    Raises:
        HalfbyteError: no name stands for these splits; the message quotes them.
    """
    steps = split_steps(pre_tokenizer)
    for name, known in PRE_TOKENIZERS.items():
        if steps == known:
            return name
    raise HalfbyteError(
        f"{where}: no llama.cpp pre-tokenizer is known for this tokenizer, "
        f"expected the splits of {', '.join(PRE_TOKENIZERS)}, got {'; '.join(map(str, steps)) or 'none'}",
        fix="start from a GGUF file of this model: its tokenizer is copied as it is",
    )


def split_steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[Step, ...]:
    """The regexes that cut text, in order; anything that is not a plain isolating split appears as a tuple."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in split_steps(part))
    if kind == "ByteLevel":
        prefix = (("ByteLevel", "add_prefix_space"),) if pre_tokenizer.get("add_prefix_space") else ()
        return prefix + ((GPT2,) if pre_tokenizer.get("use_regex", True) else ())
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return (DIGIT,)
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer.get("invert"):
        regex = pre_tokenizer["pattern"].get("Regex")
        if isinstance(regex, str):
            return (_OTHER_SPELLINGS.get(regex, regex),)
    return ((kind, *(value for key, value in pre_tokenizer.items() if key != "type")),)


def read_tensors(
    reader: GGUFReader, path: Path, family: Family, config: PretrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face parameter name, fp32 tensor) for every weight in the file, one at a time."""
    names = _hf_names(family, config.num_hidden_layers)
    for tensor in reader.tensors:
        if tensor.name not in names:
            if tensor.name == "rope_freqs.weight":
                raise HalfbyteError(
                    f"{path}, {tensor.name}: rope scaling of a GGUF source is not supported",
                    fix="start from the Hugging Face model",
                )
            raise HalfbyteError(f"{path}, {tensor.name}: tensor is unknown to this family")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        name = names[tensor.name]
        if family.interleaved_rope and ".q_proj." in name:
            values = halves_from_pairs(values, config.num_attention_heads)
        elif family.interleaved_rope and ".k_proj." in name:
            values = halves_from_pairs(values, config.num_key_value_heads)
        yield name, values


def pairs_from_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of q or k from rotary halves (Hugging Face) to neighbouring pairs (llama.cpp NORM rope).

    ``rows`` is ``[heads * head_dim, ...]``; only the first axis is permuted, so codes and scales can be passed too.
    """
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape).contiguous()


def halves_from_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`pairs_from_halves`."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape).contiguous()


def _hf_names(family: Family, blocks: int) -> dict[str, str]:
    modules = [f"{family.blocks}.{index}.{part}" for index in range(blocks) for part in family.gguf_block_names]
    modules += list(family.gguf_top_names)
    names = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    return {family.gguf_name(name): name for name in names}
