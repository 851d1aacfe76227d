"""Files of encoded candidates: one pair for every block, one for the embedding, one for a head of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from halfbyte.quant.ggml.encoded import save_encoded
from halfbyte.workdir import write_kept

Rows = dict[tuple[str, str], torch.Tensor]  # (matrix, type) -> encoded rows, in main memory
Errors = dict[str, dict[str, float]]  # matrix -> type -> squared output error per token


def write_part(folder: Path, stem: str, rows: Rows, parameters: Mapping[str, torch.Tensor], errors: Errors) -> None:
    """Write the encoded matrices of a part of the model, its other parameters, and the errors.

    Raises:
        HalfbyteError: a file cannot be written.
    """
    save_encoded(folder / f"{stem}.safetensors", rows, parameters)
    write_kept(folder / f"{stem}.json", json.dumps(errors))  # last: it says that the part is there


class PartWriter:
    """Writes a part of the model while the next one is encoded; leaving the ``with`` block waits for the last.

    Args:
        folder: for the files of the parts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._pool = folder, ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:  # otherwise that is what is told
            self._wait()

    def write(self, stem: str, rows: Rows, parameters: Mapping[str, torch.Tensor], errors: Errors) -> None:
        """Begin to write, when the part before is written.

        Raises:
            HalfbyteError: that one could not be.
        """
        self._wait()
        self._last = self._pool.submit(write_part, self._folder, stem, rows, parameters, errors)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
