"""The two loops over columns of GPTQ, for one block of columns at a time.

Rows are independent, columns are not: in torch every column is a handful of small operations; the Triton twins keep a
few rows in registers and walk through all columns in one launch. Sums run in another order, so a code that lies on the
edge between two values may differ.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.choice import use_triton

NEAR = 32  # columns between which torch passes errors on one by one; to those further on in one matrix product


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
    if use_triton(target):
        from halfbyte.kernels.columns_triton import round_columns as fast

        return fast(target, weight, step, mix, bits)
    return _round_columns(target, weight, step, mix, bits)


def _round_columns(
    target: torch.Tensor, weight: torch.Tensor, step: torch.Tensor, mix: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch; inside, columns are rows, so that each is one piece of memory."""
    top = 2 ** (bits - 1) - 1
    target, weight, step = (values.T.contiguous() for values in (target, weight, step))  # [block, out]
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), NEAR):
        near = slice(start, start + NEAR)
        wanted = torch.addmm(target[near], mix[:start, near].T, errors[:start])
        shares = mix[near, near].T.contiguous()  # [column, of which error]
        done = errors[near].T
        for k, (code, error) in enumerate(zip(codes[near], errors[near], strict=True)):
            column = torch.addmv(wanted[k], done[:, :k], shares[k, :k])
            torch.div(column, step[start + k], out=code).round_().clamp_(-top - 1, top)
            torch.addcmul(weight[start + k], code, step[start + k], value=-1, out=error)
    return codes.T, errors.T


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
    if use_triton(pull):
        from halfbyte.kernels.columns_triton import descend_columns as fast

        return fast(pull, codes, step, hessian, bits)
    # A code's best place is the nearest to where it is plus the pull of its column, less what codes moved before it
    # pull since: rounding with feedback, where the error of a column is how far it moved back.
    diagonal = hessian.diagonal()
    here = codes * step
    new, _ = _round_columns(here + pull / diagonal, here, step, (hessian / diagonal).triu(1), bits)
    return new
