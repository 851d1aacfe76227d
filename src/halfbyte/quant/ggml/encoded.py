"""Matrices encoded as ggml types: many types of each in files, one at a time in a model.

In safetensors files, written once and mapped when read: a folder has one file per block; the tensor ``NAME|TYPE`` holds
the encoded rows of matrix NAME, uint8 ``[rows, row bytes]``.

In a model, decoded when they are multiplied: a device holds their encoded rows, or nothing of them. What a matrix is at
the moment can change: rows of a ggml type, or the weight as it was, which stays in main memory and is brought over for
one product. The numbers are those of a decoded weight, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.files import whole_file, write_error
from halfbyte.quant.ggml.types import decode_tensor

SEPARATOR = "|"


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], form: str) -> None:
    """Write a safetensors file whole or not at all; ``form`` says in its metadata what it holds.

    Raises:
        HalfbyteError: it cannot be written.
    """
    on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(path) as partial:
        try:
            save_file(on_host, partial, metadata={"format": form})
        except SafetensorError as error:  # it wraps the operating system's error as text
            full = "os error 28" in str(error) or "No space left" in str(error)
            raise write_error(OSError(28 if full else 5, str(error)), path) from error


@contextmanager
def open_tensors(path: str | Path, what: str, *, missing: str) -> Iterator[safe_open]:
    """A safetensors file, mapped; it can be used after the block too.

    Args:
        what: the file in messages ("codes file").
        missing: what to do where there is none.

    Raises:
        HalfbyteError: it is missing, truncated or corrupt.
    """
    try:
        yield safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise HalfbyteError(f"{path}: {what} is missing", fix=missing) from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise HalfbyteError(
            f"{path}: {what} is truncated or corrupt, got {first_line(error)}", fix="search again"
        ) from error


def save_encoded(
    path: Path, encoded: Mapping[tuple[str, str], torch.Tensor], extra: Mapping[str, torch.Tensor]
) -> None:
    """Write ``(name, type) -> rows``, and ``extra`` tensors under their own names."""
    rows = {SEPARATOR.join(key): rows for key, rows in encoded.items()}
    save_tensors(path, {**rows, **extra}, "halfbyte.encoded.v1")


class Encoded:
    """Encoded matrices in files that are mapped: a page is read when it is used.

    Attributes:
        extra: the other tensors in the files.
    """

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], safe_open] = {}
        self.extra: dict[str, torch.Tensor] = {}

    def add(self, path: Path) -> None:
        """Map one more file.

        Raises:
            HalfbyteError: it is missing, truncated or corrupt.
        """
        with open_tensors(path, "file of encoded weights", missing="search again") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if SEPARATOR in name:
                    matrix, _, kind = name.rpartition(SEPARATOR)
                    self._files[matrix, kind] = handle
                else:
                    self.extra[name] = handle.get_tensor(name)

    def rows(self, name: str, kind: str) -> torch.Tensor:
        """Encoded rows of matrix ``name`` as type ``kind``, uint8 ``[rows, row bytes]``."""
        return self._files[name, kind].get_tensor(f"{name}{SEPARATOR}{kind}")

    def types(self) -> dict[str, list[str]]:
        """Matrix -> the types it is there in."""
        found: dict[str, list[str]] = {}
        for name, kind in self._files:
            found.setdefault(name, []).append(kind)
        return found


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
