"""Functions in torch, each with a Triton twin in ``triton.py``; which of the two runs is decided here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forced: list[str] = []


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Use ``torch`` or ``triton`` inside the block, whatever the device."""
    _forced.append(implementation)
    try:
        yield
    finally:
        _forced.pop()


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton twin computes on ``tensor``: on CUDA, where Triton is installed, unless forced otherwise."""
    if _forced:
        return _forced[-1] == "triton"
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None
