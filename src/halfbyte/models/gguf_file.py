"""Opening a GGUF file, with damage told as one line. Free of torch: the worker that runs llama.cpp opens files too."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from halfbyte.core.errors import HalfbyteError, reading


def check_magic(path: Path) -> None:
    """Refuse a file that does not start like GGUF, without reading on.

    Raises:
        HalfbyteError: missing, unreadable, or not GGUF.
    """
    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
    except FileNotFoundError as error:
        raise HalfbyteError(f"{path}: no such file, expected a GGUF file") from error
    except OSError as error:
        raise HalfbyteError(f"{path}: cannot be read, got {error.strerror or error}") from error
    if magic != b"GGUF":
        raise HalfbyteError(f"{path}: not a GGUF file, expected it to start with GGUF, got {magic or 'an empty file'}")


class _Reader(GGUFReader):
    """The file as a plain array, which is cut into the parts of a header three times as fast as a memmap."""

    @property
    def data(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._data

    @data.setter
    def data(self, value: np.ndarray) -> None:
        self._data = value.view(np.ndarray)


def open_gguf(path: Path) -> GGUFReader:
    """Read the header of a GGUF file and map its tensors.

    Raises:
        HalfbyteError: missing, unreadable, not GGUF, or shorter than its header says.
    """
    check_magic(path)
    with reading(path, "GGUF file", problem="is truncated or corrupt", fix="export or download it again"):
        return _Reader(path)


def open_source(path: Path) -> GGUFReader:
    """The same for a model that is read more than once: the header, which takes seconds, is kept until it changes."""
    stat = path.stat() if path.exists() else None
    return _kept(path, stat and (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=1)
def _kept(path: Path, version: tuple[int, int] | None) -> GGUFReader:
    return open_gguf(path)


def gguf_keys(path: Path) -> dict[str, Any]:
    """All metadata of a GGUF file.

    Raises:
        HalfbyteError: as :func:`open_gguf`.
    """
    fields = open_gguf(path).fields.items()
    with reading(path, "GGUF file", problem="is truncated or corrupt", fix="export or download it again"):
        return {key: field.contents() for key, field in fields}


def halfbyte_keys(path: str | Path) -> dict[str, Any]:
    """What halfbyte wrote into a file it exported, without the prefix: ``plan.hash`` and so on."""
    found = gguf_keys(Path(path)).items()
    return {key.removeprefix("halfbyte."): value for key, value in found if key.startswith("halfbyte.")}
