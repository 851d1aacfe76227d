"""The two loops over columns of GPTQ, for one block of columns at a time.

Rows are independent, columns are not: in torch every column is a handful of small operations; the Triton twins keep a
few rows in registers and walk through all columns in one launch. Sums run in another order, so a code that lies on the
edge between two values may differ.
"""

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


def _triton(tensor: torch.Tensor) -> bool:
    if _forced:
        return _forced[-1] == "triton"
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


def round_columns(
    target: torch.Tensor, weight: torch.Tensor, step: torch.Tensor, mix: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round columns from left to right; the error of each is added to later targets through ``mix``.

    Args:
        target: what to round, ``[out, block]``: the weights and what columns before the block left.
        weight: the weights themselves, ``[out, block]``; errors are against them.
        step: width of a code, ``[out, block]``, not 0.
        mix: strictly upper triangular, ``[block, block]``.

    Returns:
        codes as fp32 and errors ``weight − codes · step``, ``[out, block]`` each.
    """
    if _triton(target):
        from halfbyte.kernels.columns_triton import round_columns as fast

        return fast(target, weight, step, mix, bits)
    top = 2 ** (bits - 1) - 1
    errors, codes = torch.zeros_like(target), torch.zeros_like(target)
    for k in range(target.shape[1]):
        wanted = torch.addmv(target[:, k], errors[:, :k], mix[:k, k])
        codes[:, k] = (wanted / step[:, k]).round_().clamp_(-top - 1, top)
        errors[:, k] = weight[:, k] - codes[:, k] * step[:, k]
    return codes, errors


def descend_columns(
    pull: torch.Tensor, codes: torch.Tensor, step: torch.Tensor, hessian: torch.Tensor, bits: int
) -> torch.Tensor:
    """Move each code in turn to where the error is least, given all others.

    Args:
        pull: error · Hessian at these columns, ``[out, block]``.
        codes: fp32 ``[out, block]``.
        step: width of a code, ``[out, block]``, not 0.
        hessian: the block of the Hessian on its diagonal, ``[block, block]``.

    Returns:
        the new codes.
    """
    if _triton(pull):
        from halfbyte.kernels.columns_triton import descend_columns as fast

        return fast(pull, codes, step, hessian, bits)
    top = 2 ** (bits - 1) - 1
    pull, codes, diagonal = pull.clone(), codes.clone(), hessian.diagonal()
    for k in range(codes.shape[1]):
        best = codes[:, k] + pull[:, k] / diagonal[k] / step[:, k]
        change = best.round_().clamp_(-top - 1, top).sub_(codes[:, k])
        codes[:, k] += change
        pull.addr_(change.mul_(step[:, k]), hessian[k], alpha=-1)
    return codes
