"""Functions in torch, each with a Triton twin in a module of this folder; :func:`use_triton` says which one runs.

Here too, because both sides use them: the two loops over columns of GPTQ, for one block of columns at a time. Rows are
independent, columns are not: in torch every column is a handful of small operations; the Triton twins keep a few rows
in registers and walk through all columns in one launch. Sums run in another order, so a code that lies on the edge
between two values may differ.

Codes are the integers from −2^(bits−1) to 2^(bits−1) − 1, or the values of a table where those are not evenly spaced.
Rows may have bits of their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

NEAR = 32  # columns between which torch passes errors on one by one; to those further on in one matrix product

# Bits of an integer, for all or int32 [out] for each row; or the values that a code may have, fp32, ascending.
Codes = int | torch.Tensor

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


def round_columns(
    target: torch.Tensor, weight: torch.Tensor, step: torch.Tensor, mix: torch.Tensor, bits: Codes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round columns from left to right; the error of each is added to later targets through ``mix``.

    Args:
        target: what to round, ``[out, block]``: the weights and what columns before the block left.
        weight: the weights themselves, ``[out, block]``; errors are against them.
        step: width of a code, ``[out, block]``, not 0.
        mix: strictly upper triangular, ``[block, block]``.
        bits: what codes there are.

    Returns:
        codes as fp32 and errors ``weight − codes · step``, ``[out, block]`` each.
    """
    if use_triton(target):
        from halfbyte.quant.kernels.triton_kernels import round_columns as fast

        return fast(target, weight, step, mix, bits)
    return _round_columns(target, weight, step, mix, bits)


def _round_columns(
    target: torch.Tensor, weight: torch.Tensor, step: torch.Tensor, mix: torch.Tensor, bits: Codes
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch; inside, columns are rows, so that each is one piece of memory."""
    nearest = _nearest(bits)
    target, weight, step = (values.T.contiguous() for values in (target, weight, step))  # [block, out]
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), NEAR):
        near = slice(start, start + NEAR)
        wanted = torch.addmm(target[near], mix[:start, near].T, errors[:start])
        shares = mix[near, near].T.contiguous()  # [column, of which error]
        done = errors[near].T
        for k, (code, error) in enumerate(zip(codes[near], errors[near], strict=True)):
            column = torch.addmv(wanted[k], done[:, :k], shares[k, :k])
            nearest(torch.div(column, step[start + k], out=code))
            torch.addcmul(weight[start + k], code, step[start + k], value=-1, out=error)
    return codes.T, errors.T


def bounds(bits: int | torch.Tensor) -> tuple[float, float] | tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest integer of so many bits, fp32 ``[out]`` for bits of each row."""
    if isinstance(bits, int):
        return -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)
    half = torch.exp2(bits.float() - 1)
    return -half, half - 1


def is_table(bits: Codes) -> bool:
    """Whether codes are values of a table."""
    return isinstance(bits, torch.Tensor) and bits.is_floating_point()


def _nearest(bits: Codes) -> Callable[[torch.Tensor], torch.Tensor]:
    """Moves every element of a column ``[out]`` to the nearest code, in place."""
    if is_table(bits):
        assert isinstance(bits, torch.Tensor)
        middles = (bits[1:] + bits[:-1]) / 2
        return lambda values: values.copy_(bits[torch.bucketize(values, middles)])
    low, high = bounds(bits)
    return lambda values: values.round_().clamp_(low, high)  # pyright: ignore[reportCallIssue, reportArgumentType]


def descend_columns(
    pull: torch.Tensor, codes: torch.Tensor, step: torch.Tensor, hessian: torch.Tensor, bits: Codes
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
    if use_triton(pull):
        from halfbyte.quant.kernels.triton_kernels import descend_columns as fast

        return fast(pull, codes, step, hessian, bits)
    # A code's best place is the nearest to where it is plus the pull of its column, less what codes moved before it
    # pull since: rounding with feedback, where the error of a column is how far it moved back.
    diagonal = hessian.diagonal()
    here = codes * step
    new, _ = _round_columns(here + pull / diagonal, here, step, (hessian / diagonal).triu(1), bits)
    return new
