"""The standard GGUF file types: which ggml type each tensor of, say, a ``Q4_K_M`` file has.

The names and their mixtures are llama.cpp's (``src/llama-quant.cpp``, read at 0.5.0): a base type, a few tensors that
get more bits, and another type where the rows do not divide into blocks. Here they are a table for dense transformers;
mixtures of experts and anything with other tensors are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from halfbyte.core.errors import HalfbyteError

VALUES, DOWN, OUT = ("attn_v", "attn_qkv"), ("ffn_down",), ("attn_output",)
KINDS = {"attn_q", "attn_k", "ffn_up", "ffn_gate", *VALUES, *DOWN, *OUT}


@dataclass(frozen=True)
class Shape:
    """What the mixtures look at in a model.

    Attributes:
        architecture: ``general.architecture``.
        n_blocks: transformer blocks.
        n_heads, n_kv_heads: query heads, and key/value heads they share.
        tied: the token embedding is the output matrix too.
        has_imatrix: an importance matrix is given.
    """

    architecture: str
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    tied: bool
    has_imatrix: bool


Rule = tuple[tuple[str, ...], str, Callable[[int, Shape], bool]]  # kinds of tensor, type, where (block, shape)


def _everywhere(_block: int, _shape: Shape) -> bool:
    return True


def _more_bits(block: int, shape: Shape) -> bool:
    """The first and the last eighth of the blocks, and every third between them."""
    eighth = shape.n_blocks // 8
    return block < eighth or block >= 7 * shape.n_blocks // 8 or (block - eighth) % 3 == 2


def _first_eighth(block: int, shape: Shape) -> bool:
    return block < shape.n_blocks // 8


def _shared(_block: int, shape: Shape) -> bool:
    """Four or more query heads share one value head, so its matrix is small and matters more."""
    return shape.n_heads // shape.n_kv_heads >= 4


def _early_without_imatrix(block: int, shape: Shape) -> bool:
    return _first_eighth(block, shape) and not shape.has_imatrix


def _early_with_imatrix(block: int, shape: Shape) -> bool:
    return _first_eighth(block, shape) and shape.has_imatrix


_IQ4_RULES: tuple[Rule, ...] = ((VALUES, "Q5_K", _shared), (DOWN, "Q5_K", _early_without_imatrix))

# file type -> (number in general.file_type, base type, rules; the first that fits decides)
FILE_TYPES: dict[str, tuple[int, str, tuple[Rule, ...]]] = {
    "F16": (1, "F16", ()),
    "BF16": (32, "BF16", ()),
    "Q8_0": (7, "Q8_0", ()),
    "Q4_0": (2, "Q4_0", ((DOWN, "Q4_1", _early_with_imatrix),)),
    "Q4_1": (3, "Q4_1", ()),
    "Q5_0": (8, "Q5_0", ((DOWN, "Q5_1", _early_with_imatrix),)),
    "Q5_1": (9, "Q5_1", ()),
    "Q2_K": (10, "Q2_K", ((VALUES, "Q4_K", _shared), ((*VALUES, *DOWN, *OUT), "Q3_K", _everywhere))),
    "Q3_K_S": (11, "Q3_K", ()),
    "Q3_K_M": (
        12,
        "Q3_K",
        (
            (VALUES, "Q5_K", lambda block, _: block < 2),
            (DOWN, "Q5_K", lambda block, shape: block < shape.n_blocks // 16),
            ((*VALUES, *DOWN, *OUT), "Q4_K", _everywhere),
        ),
    ),
    "Q3_K_L": (13, "Q3_K", (((*VALUES, *DOWN, *OUT), "Q5_K", _everywhere),)),
    "Q4_K_S": (14, "Q4_K", ((VALUES, "Q5_K", lambda block, _: block < 4), (DOWN, "Q5_K", _first_eighth))),
    "Q4_K_M": (15, "Q4_K", (((*VALUES, *DOWN), "Q6_K", _more_bits),)),
    "Q5_K_S": (16, "Q5_K", ()),
    "Q5_K_M": (17, "Q5_K", (((*VALUES, *DOWN), "Q6_K", _more_bits),)),
    "Q6_K": (18, "Q6_K", ()),
    "IQ4_NL": (25, "IQ4_NL", _IQ4_RULES),
    "IQ4_XS": (30, "IQ4_XS", _IQ4_RULES),
}

_FALLBACK = {"IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def file_type_number(file_type: str) -> int:
    """The number of a file type in ``general.file_type`` (``enum llama_ftype``).

    Raises:
        HalfbyteError: no such file type here.
    """
    if file_type not in FILE_TYPES:
        raise HalfbyteError(f"file_type: unknown file type, expected {', '.join(FILE_TYPES)}, got {file_type}")
    return FILE_TYPES[file_type][0]


def is_quantised(name: str, n_dims: int) -> bool:
    """Whether a file type changes this tensor at all: matrices do, norms and biases stay as they are."""
    return n_dims >= 2 and name.endswith(".weight") and not name.endswith("_norm.weight")


def tensor_type(
    file_type: str, name: str, columns: int, shape: Shape
) -> tuple[GGMLQuantizationType, GGMLQuantizationType]:
    """The type that the recipe asks for one matrix, and the type it gets; they differ where rows do not divide.

    Args:
        name: GGUF tensor name, e.g. ``blk.3.ffn_down.weight``.
        columns: row length, the input features.

    Raises:
        HalfbyteError: a tensor that is none of a dense transformer's matrices.
    """
    asked = done = _recipe(file_type, name, columns, shape)
    if columns % block_size(asked):
        done = _FALLBACK.get(asked, "F16")
    if columns % block_size(done):
        done = "F16"
    return GGMLQuantizationType[asked], GGMLQuantizationType[done]


def block_size(kind: str) -> int:
    """Values that share a scale in a ggml type; rows are whole numbers of blocks."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def _recipe(file_type: str, name: str, columns: int, shape: Shape) -> str:
    file_type_number(file_type)
    _, base, rules = FILE_TYPES[file_type]
    place = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if name in ("output.weight", "token_embd.weight"):
        if base in ("F16", "BF16") or (name == "token_embd.weight" and not shape.tied):
            return base
        return "Q8_0" if base == "Q8_0" or columns % block_size(base) else "Q6_K"
    if place is None or place[2] not in KINDS:
        raise HalfbyteError(
            f"{name}: file types cover dense transformers only", fix="quantise with the engine llama-cpp-python"
        )
    kind, block = place[2], int(place[1])
    chosen = next((kind_type for kinds, kind_type, here in rules if kind in kinds and here(block, shape)), base)
    is_70b = shape.architecture == "llama" and shape.n_blocks == 80 and shape.n_heads != shape.n_kv_heads
    return "Q5_K" if is_70b and kind in VALUES and chosen in ("Q3_K", "Q4_K") else chosen
