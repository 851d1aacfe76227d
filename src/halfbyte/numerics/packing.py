"""Two int4 codes in one byte."""

from __future__ import annotations

import torch

from halfbyte.errors import HalfbyteError


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack int8 codes ``[..., n]`` in [-8, 7] into uint8 ``[..., n / 2]``; the even element is the low nibble.

    Raises:
        HalfbyteError: ``n`` is odd or a code does not fit.
    """
    if codes.shape[-1] % 2:
        raise HalfbyteError("cannot pack an odd number of codes", where="pack_int4", got=codes.shape[-1])
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise HalfbyteError("code does not fit four bits", where="pack_int4", expected="-8 to 7")
    nibbles = (codes & 0xF).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_int4`: int8 codes ``[..., 2 * n]`` from uint8 ``[..., n]``."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).to(torch.int8)  # [..., n, 2]
    return torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(-2)
