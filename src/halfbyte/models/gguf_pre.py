"""Which ``tokenizer.ggml.pre`` of llama.cpp splits text as a byte-level tokenizer does.

A byte-level BPE first cuts text with regular expressions and merges bytes inside the pieces. A GGUF file does not
carry the expressions, only a name that llama.cpp knows (llama-vocab.cpp), so the name is found by comparing the
expressions in ``tokenizer.json`` with those that stand behind each name. An unknown one is an error: a near miss would
run, and worsen every answer a little.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.core.errors import HalfbyteError

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
