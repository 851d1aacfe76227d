"""ggml tensor types: floats in any type that llama.cpp writes, and back.

Source of the layouts: ggml's block definitions (ggml-common.h) and the GGUF specification (ggml, docs/gguf.md).
Quantised types are encoded by ``libgguf``, which is ggml's reference code: the bytes are llama.cpp's own.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any

import libgguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from gguf.quants import quantize

from halfbyte.core.errors import HalfbyteError

SMALL_BLOCK = 32  # elements of Q4_0, IQ4_NL, Q8_0 and the like; 256 of the others
QUANTISED = (  # ascending by bits per weight
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_S",
    "Q3_K",
    "IQ4_XS",
    "IQ4_NL",
    "Q4_0",
    "Q4_K",
    "Q4_1",
    "Q5_0",
    "Q5_K",
    "Q5_1",
    "Q6_K",
    "Q8_0",
)
WRITABLE = ("F32", "F16", "BF16", *reversed(QUANTISED))  # what `encode` knows
READABLE = tuple(GGMLQuantizationType.__members__)
FP16_MAX = 65504.0
ENCODE_ELEMENTS = 1 << 20  # values per chunk of `encode`: 4 MiB of fp32 in each thread
DECODE_ELEMENTS = 1 << 22  # values per chunk of `decode_tensor`: about 50 MiB of intermediates
PEAK_EXPONENT = 16  # the largest importance becomes 2^15 to 2^17, ...
FLOOR = 2.0**-16  # ... and none is below this: far from what fp32 sums of fourth powers cannot hold
Array = np.ndarray[Any, np.dtype[Any]]
_tables_lock = Lock()


def bits_per_weight(type_name: str) -> float:
    """Stored bits per element of a ggml type, scales included: 4.5 for ``Q4_0``.

    Raises:
        HalfbyteError: there is no such type.
    """
    block, block_bytes = _sizes(type_name)
    return 8 * block_bytes / block


def block_size(type_name: str) -> int:
    """How many elements a block of a ggml type has.

    Raises:
        HalfbyteError: there is no such type.
    """
    return _sizes(type_name)[0]


def fits(in_features: int, type_name: str) -> bool:
    """Whether rows of ``in_features`` elements divide into blocks of a type that :func:`encode` can write.

    Raises:
        HalfbyteError: there is no such type.
    """
    return in_features % _sizes(type_name, WRITABLE)[0] == 0


def needs_importance(type_name: str) -> bool:
    """Whether :func:`encode` refuses this type without an importance, as llama.cpp does.

    Raises:
        HalfbyteError: there is no such type.
    """
    _sizes(type_name, WRITABLE)
    return libgguf.quantize_requires_imatrix(GGMLQuantizationType[type_name])


def row_bytes(in_features: int, type_name: str, *, where: object = "tensor") -> int:
    """Bytes of one row of ``in_features`` elements in a type that :func:`encode` can write.

    Raises:
        HalfbyteError: there is no such type, or its block does not divide the row.
    """
    block, block_bytes = _sizes(type_name, WRITABLE, where=where)
    if in_features % block:
        others = "F16 or BF16" if in_features % SMALL_BLOCK else "F16, BF16 or a type in blocks of 32 (Q4_0, IQ4_NL)"
        raise HalfbyteError(
            f"{where}: rows do not divide into {type_name} blocks, expected a multiple of {block}, got {in_features}",
            fix=f"choose {others} for it",
        )
    return in_features // block * block_bytes


def encode(
    values: torch.Tensor, type_name: str, *, importance: torch.Tensor | None = None, where: object = "tensor"
) -> Array:
    """Encode ``values`` ``[..., in]`` as llama.cpp does: uint8 ``[..., row bytes]``, or fp16/fp32 of the same shape.

    Args:
        values: floats on any device; rows go through fp32 in chunks, on as many threads as there are cores.
        type_name: one of ``WRITABLE``.
        importance: what a squared error costs in each input channel, ``[in]``, in any unit: it is scaled by a power of
            four first, which leaves the bytes as they are. Channels of less than 2^-31 of the largest count as about
            that much, so that a dead block is still encoded (ggml makes it zeros, or aborts); so all zeros mean the
            same as all ones, and from zeros the bytes are not llama.cpp's. The types in floats ignore it.
        where: what errors name.

    Raises:
        HalfbyteError: unknown type, a row that the block does not divide, NaN or Inf, or values beyond fp16 (which
            holds the scales of quantised blocks too); an importance of another length, negative or not finite, or
            none for a type that needs it.
    """
    size = row_bytes(values.shape[-1], type_name, where=where)
    if type_name not in QUANTISED:
        return quantize(_checked(values, type_name, where), GGMLQuantizationType[type_name])
    if importance is None and needs_importance(type_name):
        raise HalfbyteError(
            f"{where}: {type_name} needs an importance of each input channel, got none",
            fix="calibrate first, or choose Q2_K or IQ3_XXS for it",
        )
    channels = None if importance is None else _scaled_importance(importance, values.shape[-1], where)
    kind = int(GGMLQuantizationType[type_name])
    _build_tables(kind)
    rows = values.detach().reshape(-1, values.shape[-1])
    encoded = np.empty((len(rows), size), np.uint8)
    step = max(1, ENCODE_ELEMENTS // rows.shape[1])

    def encode_chunk(start: int) -> None:
        chunk = _checked(rows[start : start + step], type_name, where)
        encoded[start : start + step] = libgguf.quantize_rows(chunk, kind, imatrix=channels)

    starts = range(0, len(rows), step)
    if len(starts) > 1:
        with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
            list(pool.map(encode_chunk, starts))
    elif starts:
        encode_chunk(0)
    return encoded.reshape(*values.shape[:-1], size)


def decode(blocks: Array, type_name: str) -> Array:
    """What encoded rows stand for, fp32 ``[..., in]``: undoes :func:`encode`, and reads the other ggml types.

    Raises:
        HalfbyteError: there is no such type.
    """
    _sizes(type_name)
    return dequantize(blocks, GGMLQuantizationType[type_name])


def decode_tensor(blocks: torch.Tensor, type_name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """:func:`decode` on the device of ``blocks``: uint8 ``[rows, row bytes]`` to ``dtype`` ``[rows, in]``.

    Values are computed in fp32, equal bit for bit to :func:`decode`, and rounded once to ``dtype``. F32, F16 and BF16
    rows are given as bytes too. In main memory ggml's own code decodes, ten times as fast as tensor operations; a GPU
    is not waited for, except once for the tables of a type.

    Raises:
        HalfbyteError: :func:`encode` does not write such a type, or ``blocks`` are not rows of it.
    """
    block, block_bytes = _sizes(type_name, WRITABLE)
    check_rows(blocks, type_name, block_bytes)
    out = torch.empty(len(blocks), blocks.shape[1] // block_bytes * block, dtype=dtype, device=blocks.device)
    step = max(1, DECODE_ELEMENTS // max(1, out.shape[1]))
    for start in range(0, len(out), step):
        target = out[start : start + step]
        target.copy_(_decode_rows(blocks[start : start + step].clone(), type_name))  # aligned by clone
    return out


def check_largest(largest: float, type_name: str, where: object) -> None:
    """Refuse values of which ``largest`` has the largest size, where a type cannot hold that, or it is NaN.

    Raises:
        HalfbyteError: it is beyond fp16, which holds the scales of quantised types, or beyond the type itself.
    """
    limit = float(np.finfo(np.float32).max) if type_name in ("F32", "BF16") else FP16_MAX
    if not largest <= limit:  # also true for NaN
        raise HalfbyteError(
            f"{where}: values do not fit {type_name}, expected |w| up to {limit:g}, got {largest:g}",
            fix="choose BF16 or F32 for it, or check the checkpoint",
        )


def check_rows(blocks: torch.Tensor, type_name: str, block_bytes: int) -> None:
    """Refuse a tensor that is not uint8 ``[rows, blocks * block_bytes]``.

    Raises:
        HalfbyteError: another dtype or number of dimensions, or a part of a block.
    """
    if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] % block_bytes:
        raise HalfbyteError(
            f"{type_name}: not rows of its blocks, expected uint8 [rows, a multiple of {block_bytes}], "
            f"got {blocks.dtype} {list(blocks.shape)}"
        )


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _decode_rows(blocks: torch.Tensor, type_name: str) -> torch.Tensor:
    if type_name in _FLOATS:
        return blocks.view(_FLOATS[type_name])
    if blocks.device.type == "cpu":
        return torch.from_numpy(libgguf.dequantize_rows(blocks.numpy(), GGMLQuantizationType[type_name]))
    from halfbyte.quant.ggml import codebook, grid  # here, because they need this module

    form = grid if grid.has_grid(type_name) else codebook
    return form.values_of(blocks, type_name)


def _checked(values: torch.Tensor, type_name: str, where: object) -> Array:
    """``values`` as fp32 in main memory, if the type can hold them."""
    array = values.detach().to("cpu", torch.float32).contiguous().numpy()
    check_largest(float(np.abs(array).max(initial=0.0)), type_name, where)
    return array


def _scaled_importance(importance: torch.Tensor, in_features: int, where: object) -> Array:
    """fp32 ``[in]`` between ``FLOOR`` and twice 2^``PEAK_EXPONENT``.

    ggml compares products of sums weighted with it, which under- or overflow in fp32 where it is very small or large;
    a group of weights of no importance at all ends as zeros, or finds no grid point and aborts the process.
    """
    array = importance.detach().to("cpu", torch.float64).numpy()
    if array.shape != (in_features,):
        raise HalfbyteError(
            f"{where}: importance does not fit, expected {in_features} values, got {list(array.shape)}",
            fix="calibrate on this model's own layers",
        )
    lowest, peak = float(array.min(initial=0.0)), float(array.max(initial=0.0))
    if not (lowest >= 0.0 and np.isfinite(peak)):  # also true for NaN
        raise HalfbyteError(
            f"{where}: importance is not finite or is negative, expected values from 0 up, got {lowest:g} to {peak:g}",
            fix="calibrate again, or leave it out",
        )
    if peak == 0.0:
        return np.ones(in_features, np.float32)
    even = int(np.frexp(peak)[1]) // 2 * 2  # a power of four keeps square roots exact too
    return np.maximum(np.ldexp(array, PEAK_EXPONENT - even), FLOOR).astype(np.float32)


@cache
def _build_tables(kind: int) -> None:
    """Let libgguf build the tables that the type's encoder looks up: two threads that both build them crash."""
    with _tables_lock:
        libgguf.quantize_rows(np.ones((1, 256), np.float32), kind, imatrix=np.ones(256, np.float32))


def _sizes(type_name: str, known: tuple[str, ...] = READABLE, *, where: object = "ggml") -> tuple[int, int]:
    if type_name not in known:
        raise HalfbyteError(f"{where}: unknown tensor type, expected {' or '.join(known)}, got {type_name!r}")
    return GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
