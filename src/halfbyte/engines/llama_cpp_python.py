"""The engine ``llama-cpp-python``: its module ``llama_cpp`` is a binding of the llama.cpp C functions already."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from halfbyte.core.errors import HalfbyteError
from halfbyte.engines.llamacpp import Engine

PACKAGE = "llama-cpp-python"
INSTALL = f"pip install {PACKAGE}"


def load() -> Any:
    """The module ``llama_cpp``.

    Raises:
        HalfbyteError: it is missing, cannot be loaded, or was written for another library than it finds.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise HalfbyteError(f"{PACKAGE}: llama.cpp engine is not installed", fix=INSTALL)
    try:
        api = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise HalfbyteError(f"{PACKAGE}: llama.cpp engine cannot be loaded, got {error}", fix=INSTALL) from error
    params = api.llama_context_default_params()
    if (params.n_ctx, params.n_batch) != (512, 2048):
        got = f"n_ctx {params.n_ctx}, n_batch {params.n_batch}"
        raise HalfbyteError(f"{PACKAGE}: module and library disagree, expected n_ctx 512, n_batch 2048, got {got}")
    return api


def open_llama_cpp_python() -> Engine:
    """llama.cpp as this package brings it; raises what :func:`load` raises."""
    api = load()
    return Engine(PACKAGE, getattr(api, "__version__", "unknown"), api)


ENGINE = open_llama_cpp_python
