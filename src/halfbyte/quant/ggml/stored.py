"""Matrices that are decoded when they are multiplied: a device holds their encoded rows, or nothing of them.

What a matrix is at the moment can change: rows of a ggml type, or the weight as it was, which stays in main memory and
is brought over for one product. The numbers are those of a decoded weight, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from halfbyte.quant.ggml.types import decode_tensor


class StoredMatrix:
    """A weight ``[out, in]``; where its shape, its dtype or parts of it are wanted it stands for the tensor.

    Attributes:
        original: the weight as it was, where it was.
        dtype: of the weight when it is made.
        device: where it is made.
        rows: encoded, uint8 ``[out, row bytes]``; None: it is the original.
        type: ggml type of the rows.
        held: the original on the device, for a while.
    """

    def __init__(self, original: torch.Tensor, device: torch.device) -> None:
        self.original, self.device = original, device
        self.shape, self.dtype = original.shape, original.dtype
        self.rows: torch.Tensor | None = None
        self.type = ""
        self.held: torch.Tensor | None = None

    def encode_as_(self, rows: torch.Tensor | None, type_name: str = "") -> None:
        """Become these rows, or the original again; rows may stay in main memory where only few are looked up."""
        self.rows, self.type = rows, type_name

    def hold_(self, *, on_device: bool) -> None:
        """Keep the original on the device, or no longer."""
        self.held = self.original.to(self.device) if on_device else None

    def whole(self) -> torch.Tensor:
        """The weight on the device, ``[out, in]``."""
        return self._made(slice(None))

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """``size`` rows of it at a time, as ``Tensor.split`` gives them."""
        return (self._made(slice(start, start + size)) for start in range(0, self.shape[0], size))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:  # [...] -> [..., in]
        """The rows ``ids`` of the weight on the device; no others are decoded, or leave main memory."""
        stored = self.original if self.rows is None else self.rows
        found = stored.index_select(0, ids.flatten().to(stored.device)).to(self.device)
        return self._decoded(found).view(*ids.shape, -1)

    def _made(self, rows: slice) -> torch.Tensor:
        if self.rows is not None:
            return self._decoded(self.rows[rows].to(self.device))
        return (self.original if self.held is None else self.held)[rows].to(self.device)

    def _decoded(self, stored: torch.Tensor) -> torch.Tensor:
        return stored if self.rows is None else decode_tensor(stored, self.type, self.dtype)


class StoredLinear(nn.Module):
    """A linear layer on a stored matrix.

    Attributes:
        weight: no parameter: moving the model leaves it where it is.
    """

    def __init__(self, weight: StoredMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        """Decode, then multiply."""
        return nn.functional.linear(x, self.weight.whole(), self.bias)


class StoredEmbedding(nn.Module):
    """An embedding on a stored matrix.

    Attributes:
        weight: no parameter: moving the model leaves it where it is.
    """

    def __init__(self, weight: StoredMatrix) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [...] -> [..., width]
        """Decode the rows asked for."""
        return self.weight.lookup(ids)


def store_matrix_(model: nn.Module, name: str, device: torch.device) -> StoredMatrix:
    """Let the linear layer or embedding ``name`` keep its weight stored, for products on ``device``."""
    old = cast(nn.Linear, model.get_submodule(name))  # or an embedding, which has a weight too
    stored = StoredMatrix(old.weight.detach(), device)
    is_linear = isinstance(old, nn.Linear)
    model.set_submodule(name, StoredLinear(stored, old.bias) if is_linear else StoredEmbedding(stored))
    return stored
