"""ggml tensor types: int4 codes as Q4_0 blocks, floats in any type that ``gguf`` can encode, and back.

Source of the layouts: ggml's block definitions (ggml-common.h) and the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from gguf.quants import quantize

from halfbyte.errors import HalfbyteError
from halfbyte.formats.int_group import GroupedWeight

BLOCK = 32  # elements that share one scale in Q4_0 and Q8_0
WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # what `encode` knows
READABLE = tuple(GGMLQuantizationType.__members__)
FP16_MAX = 65504.0
Array = np.ndarray[Any, np.dtype[Any]]


def bits_per_weight(type_name: str) -> float:
    """Stored bits per element of a ggml type, scales included: 4.5 for ``Q4_0``.

    Raises:
        HalfbyteError: there is no such type.
    """
    block, block_bytes = _sizes(type_name)
    return 8 * block_bytes / block


def row_bytes(in_features: int, type_name: str, *, where: object = "tensor") -> int:
    """Bytes of one row of ``in_features`` elements in a type that :func:`encode` can write.

    Raises:
        HalfbyteError: there is no such type, or its block does not divide the row.
    """
    block, block_bytes = _sizes(type_name, WRITABLE, where=where)
    if in_features % block:
        raise HalfbyteError(
            f"rows do not divide into {type_name} blocks", where=where, expected=f"a multiple of {block}",
            got=in_features, fix="choose F16 or BF16 for it",
        )  # fmt: skip
    return in_features // block * block_bytes


def check_q4_0(weight: GroupedWeight, *, where: object = "weight") -> None:
    """Refuse codes that Q4_0 cannot hold as they are.

    Raises:
        HalfbyteError: not 4 bits, groups that 32 does not divide, or scales that do not cover the row.
    """
    in_features, groups = weight.codes.shape[1], weight.scales.shape[1]
    if weight.bits != 4:
        raise HalfbyteError("Q4_0 holds 4-bit codes", where=where, expected="bits 4", got=weight.bits)
    if groups == 0 or in_features % groups or weight.group_size % BLOCK:
        raise HalfbyteError(
            "weight groups do not divide into Q4_0 blocks", where=where, expected=f"groups of a multiple of {BLOCK}",
            got=f"{groups} groups in a row of {in_features}", fix="use another group size, or leave this layer as F16",
        )  # fmt: skip


def q4_0_blocks(weight: GroupedWeight, *, where: object = "weight") -> Array:
    """The codes themselves as Q4_0, uint8 ``[out, in / 32 * 18]``; nothing is quantised again.

    A block is the fp16 scale of its group, then 16 bytes: code j + 8 in the low and code j + 16 (+ 8) in the high
    nibble. A group of 128 becomes four blocks with the same scale.

    Raises:
        HalfbyteError: see :func:`check_q4_0`.
    """
    check_q4_0(weight, where=where)
    out_features = weight.codes.shape[0]
    codes = weight.codes.cpu().numpy().reshape(out_features, -1, 2, BLOCK // 2)  # [out, blocks, 2, 16]
    nibbles = (codes + np.int8(8)).view(np.uint8)
    packed = nibbles[:, :, 0] | (nibbles[:, :, 1] << np.uint8(4))  # [out, blocks, 16]
    scales = weight.scales.cpu().numpy().astype("<f2").repeat(weight.group_size // BLOCK, axis=1)  # [out, blocks]
    blocks = np.concatenate([scales[..., None].view(np.uint8), packed], axis=-1)  # [out, blocks, 18]
    return blocks.reshape(out_features, -1)


def encode(values: torch.Tensor, type_name: str, *, where: object = "tensor") -> Array:
    """Encode ``values`` ``[..., in]`` as ``gguf`` does: uint8 ``[..., row bytes]``, or fp16/fp32 of the same shape.

    Raises:
        HalfbyteError: unknown type, a row that the block does not divide, NaN or Inf, or values beyond fp16 (which
            holds the scales of quantised blocks too).
    """
    row_bytes(values.shape[-1], type_name, where=where)
    array = values.detach().to("cpu", torch.float32).numpy()
    largest = float(np.abs(array).max(initial=0.0))
    limit = float(np.finfo(np.float32).max) if type_name in ("F32", "BF16") else FP16_MAX
    if not largest <= limit:  # also true for NaN
        raise HalfbyteError(
            f"values do not fit {type_name}", where=where, expected=f"|w| up to {limit:g}", got=f"{largest:g}",
            fix="choose BF16 or F32 for it, or check the checkpoint",
        )  # fmt: skip
    return quantize(array, GGMLQuantizationType[type_name])


def q8_0_blocks(values: torch.Tensor, *, where: object = "tensor") -> Array:
    """Q8_0 blocks (fp16 scale, 32 int8) of ``values``: uint8 ``[..., in / 32 * 34]``. See :func:`encode`."""
    return encode(values, "Q8_0", where=where)


def f16(values: torch.Tensor, *, where: object = "tensor") -> Array:
    """``values`` as fp16, the same shape; beyond 65504 is an error, never Inf. See :func:`encode`."""
    return encode(values, "F16", where=where)


def decode(blocks: Array, type_name: str) -> Array:
    """What encoded rows stand for, fp32 ``[..., in]``: undoes :func:`encode`, :func:`q4_0_blocks` and other ggml types.

    Raises:
        HalfbyteError: there is no such type.
    """
    _sizes(type_name)
    return dequantize(blocks, GGMLQuantizationType[type_name])


def _sizes(type_name: str, known: tuple[str, ...] = READABLE, *, where: object = "ggml") -> tuple[int, int]:
    if type_name not in known:
        raise HalfbyteError("unknown tensor type", where=where, expected=" or ".join(known), got=repr(type_name))
    return GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
