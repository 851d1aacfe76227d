"""The ggml types whose codes stand for several weights at once: sizes from a codebook, scales of groups, signs.

A block of 256 weights has 32 sets of 8; each has a byte of signs, and one entry of 8 or two of 4 sizes.
Source of layouts and arithmetic: ggml's block definitions (ggml-common.h) and ``dequantize_row_iq*`` (ggml-quants.c);
the codebooks are those of the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from halfbyte.quant.ggml.types import check_rows

SETS = 32  # in a block, of 8 weights each
# Blocks uint8 [n, block bytes] -> scales fp32 [n, groups], entries int [n, 256 / width], signs as bytes int [n, SETS].
Parts = tuple[Tensor, Tensor, Tensor]


def values_of(blocks: Tensor, type_name: str) -> Tensor:
    """What encoded rows stand for: uint8 ``[rows, row bytes]`` to fp32 ``[rows, in]``, as ggml computes it.

    Nothing is read from or written to the host once the tables are on the device.

    Raises:
        HalfbyteError: ``blocks`` are not rows of the type.
    """
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    check_rows(blocks, type_name, block_bytes)
    scales, entries, signs = CODEBOOKS[type_name](blocks.reshape(-1, block_bytes))
    n, groups = scales.shape
    sizes = _sizes_table(type_name, blocks.device)[entries]  # [n, 256 / width, width]
    values = scales.view(n, groups, 1) * sizes.view(n, groups, -1)
    values = values.view(n, SETS, 8) * _signs_table(blocks.device)[signs]
    return values.view(len(blocks), -1)


@cache
def _sizes_table(type_name: str, device: torch.device) -> Tensor:
    """fp32 ``[entries, 4 or 8]``, sent to the device once."""
    codec: Any = getattr(quants, type_name)
    codec.init_grid()
    return torch.from_numpy(codec.grid.reshape(codec.grid_shape)).float().to(device)


@cache
def _signs_table(device: torch.device) -> Tensor:
    """What the bits of a byte mean, the lowest first: fp32 ±1 ``[256, 8]``."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (1.0 - 2.0 * bits).to(device)


def _numbers(blocks: Tensor, start: int, count: int, width: int) -> Tensor:
    """``count`` little-endian numbers of ``width`` bytes from byte ``start`` on: int64 ``[n, count]``."""
    held = blocks[:, start : start + count * width].reshape(len(blocks), count, width).long()
    return (held << 8 * torch.arange(width, device=blocks.device)).sum(-1)


def _split(numbers: Tensor, width: int, count: int) -> Tensor:
    """The ``count`` lowest fields of ``width`` bits of each number, from the lowest up: ``[n, k * count]``."""
    shifts = width * torch.arange(count, device=numbers.device)
    return (numbers.unsqueeze(-1) >> shifts & 2**width - 1).flatten(1)


def _fp16(blocks: Tensor) -> Tensor:
    """The fp16 that a block starts with, fp32 ``[n, 1]``."""
    return blocks[:, :2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _with_parity(signs: Tensor) -> Tensor:
    """Seven bits and, above them, whether they are odd: the number of negative weights in a set is even."""
    folded = signs ^ signs >> 4
    folded = folded ^ folded >> 2
    return signs | ((folded ^ folded >> 1) & 1) << 7


def _iq2_xxs(blocks: Tensor) -> Parts:
    """Per 32 weights 4 entries of a byte, then 32 bits: 4 times 7 bits of signs, 4 bits of scale."""
    words = _numbers(blocks, 2, 16, 4)
    entries, rest = words[:, ::2], words[:, 1::2]
    scales = _fp16(blocks) * (0.5 + (rest >> 28)) * 0.25
    return scales, _split(entries, 8, 4), _with_parity(_split(rest, 7, 4))


def _iq2_xs(blocks: Tensor) -> Parts:
    """Per 8 weights 9 bits of entry and 7 of signs; per 16 weights 4 bits of scale."""
    words = _numbers(blocks, 2, SETS, 2)
    scales = _fp16(blocks) * (0.5 + _split(_numbers(blocks, 66, 8, 1), 4, 2)) * 0.25
    return scales, words & 511, _with_parity(words >> 9)


def _iq2_s(blocks: Tensor) -> Parts:
    """Per 8 weights 8 low bits of entry; then signs; then 2 high bits of entry; per 16 weights 4 bits of scale."""
    low, signs = _numbers(blocks, 2, SETS, 1), _numbers(blocks, 34, SETS, 1)
    high = _split(_numbers(blocks, 66, 8, 1), 2, 4)
    scales = _fp16(blocks) * (0.5 + _split(_numbers(blocks, 74, 8, 1), 4, 2)) * 0.25
    return scales, low | high << 8, signs


def _iq3_xxs(blocks: Tensor) -> Parts:
    """Per 4 weights an entry of a byte; then per 32 weights 32 bits: 4 times 7 bits of signs, 4 bits of scale."""
    rest = _numbers(blocks, 66, 8, 4)
    scales = _fp16(blocks) * (0.5 + (rest >> 28)) * 0.5
    return scales, _numbers(blocks, 2, 2 * SETS, 1), _with_parity(_split(rest, 7, 4))


def _iq3_s(blocks: Tensor) -> Parts:
    """Per 4 weights 8 low bits of entry; then one high bit each; then signs; per 32 weights 4 bits of scale."""
    low, high = _numbers(blocks, 2, 2 * SETS, 1), _split(_numbers(blocks, 66, 8, 1), 1, 8)
    scales = _fp16(blocks) * (1 + 2 * _split(_numbers(blocks, 106, 4, 1), 4, 2))
    return scales, low | high << 8, _numbers(blocks, 74, SETS, 1)


CODEBOOKS: dict[str, Callable[[Tensor], Parts]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
