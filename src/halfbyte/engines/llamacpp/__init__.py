"""llama.cpp as an engine: load a GGUF file, or write it in other types.

It comes as one of several installed packages, which all bring the same C functions (``include/llama.h``); here they are
used through their C names. llama.cpp multiplies with 8-bit activations whatever the file says: a GGUF file chooses
weight types only.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from halfbyte.core.environment import cores
from halfbyte.core.errors import HalfbyteError
from halfbyte.engines.llamacpp.model import MAX_BATCH, Generation, GGUFModel, Speed
from halfbyte.engines.llamacpp.quantize import quantize_native, quantize_rows, read_importance
from halfbyte.models.gguf_file import check_magic
from halfbyte.models.layers import Outcome

__all__ = ["Engine", "GGUFModel", "Generation", "Speed", "default_threads"]

LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR


def default_threads() -> int:
    """Physical cores of this machine, or fewer where the process may not use them all."""
    return max(1, min(cores(), psutil.cpu_count(logical=False) or cores()))


def _threads(wanted: int | None) -> int:
    if wanted is not None and wanted < 1:
        raise HalfbyteError(f"n_threads: too few threads, expected at least 1, got {wanted}")
    return wanted or default_threads()


class _Errors:
    """llama.cpp's log, kept from the terminal; its error lines wait here for the message that the user sees."""

    def __init__(self, api: Any) -> None:
        self.lines: list[str] = []
        self._callback = api.llama_log_callback(self._receive)  # must outlive every call into the library
        api.llama_log_set(self._callback, None)
        weakref.finalize(self, api.llama_log_set, api.llama_log_callback(), None)  # also at exit, after the models

    def _receive(self, level: int, text: bytes | None, _user_data: object) -> None:
        if level == LOG_ERROR and text:
            self.lines.append(text.decode("utf-8", "replace").strip())

    def take(self) -> str | None:
        """The first error since the last call: it names the cause, the ones after it only say that something failed."""
        line = self.lines[0] if self.lines else None
        self.lines.clear()
        return line


class Engine:
    """llama.cpp as one installed package; made by :func:`halfbyte.engines.open_engine`.

    Attributes:
        name: of the engine.
        version: package and version, e.g. ``xllamacpp 2026.10.11549``.
    """

    def __init__(self, name: str, version: str, api: Any) -> None:
        self.name, self.version = name, f"{name} {version}"
        self._api = api
        self._errors = _Errors(api)
        api.llama_backend_init()

    def load(
        self, path: str | Path, *, n_ctx: int = 512, n_threads: int | None = None, n_gpu_layers: int = 0
    ) -> GGUFModel:
        """Load a GGUF file, ready to run; use it as a context manager or call ``close``.

        Args:
            n_ctx: most tokens of prompt and continuation together.
            n_threads: CPU threads; None means :func:`default_threads`.
            n_gpu_layers: blocks to put on the GPU, -1 for all; the wheel must have been built for one.

        Raises:
            HalfbyteError: the file is missing, incomplete or not GGUF, or the arguments or the memory do not allow it.
        """
        path = Path(path)
        check_magic(path)
        if n_ctx < 1:
            raise HalfbyteError(f"n_ctx: context is too small, expected at least 1 token, got {n_ctx}")
        if n_gpu_layers != 0 and not self._api.llama_supports_gpu_offload():
            raise HalfbyteError(f"{self.version}: this llama.cpp has no GPU support", fix="use n_gpu_layers=0")
        threads, api, started = _threads(n_threads), self._api, time.perf_counter()
        self._errors.take()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = n_gpu_layers
        model = api.llama_model_load_from_file(os.fsencode(path), model_params)
        if not model:
            raise HalfbyteError(
                f"{path}: llama.cpp cannot load this file, got {self._errors.take()}", fix="export or download it again"
            )
        params = api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(n_ctx, MAX_BATCH)
        params.n_threads = params.n_threads_batch = threads
        for field in ("n_outputs_max", "n_outputs_max_per_seq"):  # newer llama.cpp: rows of logits per batch
            if hasattr(params, field):
                setattr(params, field, params.n_batch)
        context = api.llama_init_from_model(model, params)
        if not context:
            api.llama_model_free(model)
            raise HalfbyteError(
                f"{path}: llama.cpp cannot make a context, got {self._errors.take()}", fix=f"use n_ctx below {n_ctx}"
            )
        return GGUFModel(api, self._errors.take, path, model, context, n_ctx, time.perf_counter() - started)

    def quantize(
        self,
        source: str | Path,
        target: str | Path,
        file_type: str,
        *,
        n_threads: int | None = None,
        imatrix: str | Path | Mapping[str, np.ndarray] | None = None,
    ) -> tuple[Outcome, ...]:
        """Write ``source`` (GGUF, any types) as ``target`` in a standard mixture of types such as ``Q4_K_M``.

        Args:
            file_type: one of ``ftypes.FILE_TYPES``; quantised sources are dequantised first, which costs quality.
            imatrix: importance of each input channel: a GGUF importance-matrix file, or tensor name -> float32 [in].

        Returns:
            One outcome per tensor that did not get the type of the recipe, with the reason; none from
            llama-cpp-python, which does not say.

        Raises:
            HalfbyteError: the file type is unknown, the source cannot be read, or the target cannot be written.
        """
        source, target = Path(source), Path(target)
        check_magic(source)
        if target.exists() and target.samefile(source):
            raise HalfbyteError(f"{target}: source and target are the same file", fix="name another target")
        threads = _threads(n_threads)
        importance = read_importance(imatrix) if imatrix is not None else {}
        self._errors.take()
        if hasattr(self._api, "llama_model_quantize"):
            return quantize_native(self._api, self._errors.take, source, target, file_type, threads, importance)
        return quantize_rows(self._api, source, target, file_type, threads, importance)
