"""Weights from their packed codes, into a buffer that layers may share."""

from __future__ import annotations

import torch

from halfbyte.quant.int4 import GroupedWeight, unpack_int4
from halfbyte.quant.kernels import use_triton

CHUNK_ELEMENTS = 2**20  # of the result; each takes about 10 bytes of temporaries


def decode_packed(
    packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights ``[out, in]`` that int4 codes stand for, in ``dtype``; the Triton twin gives the same bits.

    Args:
        packed: uint8 ``[out, in / 2]`` of :func:`halfbyte.quant.int4.pack_int4`.
        scales: fp16 ``[out, groups]``.
        out: where to write, ``[out, in]`` of ``dtype``, contiguous; otherwise a new tensor.
    """
    shape = (packed.shape[0], 2 * packed.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    assert (out.shape, out.dtype, out.is_contiguous()) == (shape, dtype, True), "a buffer of another kind"
    if use_triton(packed):
        from halfbyte.quant.kernels.triton_kernels import decode_packed as fast

        return fast(packed, scales, out)
    rows = max(1, CHUNK_ELEMENTS // max(1, shape[1]))
    for part in (slice(start, start + rows) for start in range(0, shape[0], rows)):
        out[part] = GroupedWeight(unpack_int4(packed[part]), scales[part]).decode()
    return out
