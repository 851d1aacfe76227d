"""Matrices encoded as ggml types, many types of each, in safetensors files: written once, mapped when read.

A folder has one file per block; the tensor ``NAME|TYPE`` holds the encoded rows of matrix NAME, uint8
``[rows, row bytes]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.files import whole_file, write_error

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
    except (SafetensorError, OSError) as error:
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
