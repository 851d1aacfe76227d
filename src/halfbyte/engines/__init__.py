"""Engines that run GGUF files, one file each; importing this loads none of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from halfbyte.core.registry import Registry

if TYPE_CHECKING:
    from halfbyte.engines.llamacpp import Engine

ENGINES: Registry[Callable[[], Engine]] = Registry("engine", "halfbyte.engines", "ENGINE")


def open_engine(name: str = "xllamacpp") -> Engine:
    """The engine ``name``, opened once per process.

    Raises:
        HalfbyteError: no such engine, not installed (the message has the pip command), or an unknown struct layout.
    """
    return _opened(name)


@cache
def _opened(name: str) -> Engine:
    return ENGINES.find(name, where="engine")()
