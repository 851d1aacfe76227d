"""GPTQ on the grids of ggml types: scales of the least weighted error, then codes column by column with feedback.

llama.cpp's quantiser rounds every weight on its own. The bytes here are as many and as valid; types whose codes stand
for several weights at once stay with llama.cpp's quantiser. See :mod:`halfbyte.quant.ggml.block_scales` and
:mod:`halfbyte.quant.quantisers.gptq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from halfbyte.core.precision import products
from halfbyte.quant.ggml.block_scales import choose_rows
from halfbyte.quant.ggml.grid import GRIDS, grid_of, has_grid, with_codes
from halfbyte.quant.ggml.types import decode_tensor, encode
from halfbyte.quant.quantisers.gptq import Ordered, descended_codes, feedback_codes

SWEEPS = 2  # of coordinate descent
FINE = 8  # bits of codes that are as good as they need to be
TOGETHER = 1 << 25  # weights whose codes are chosen at once: the loops over columns cost the same for many rows
FAR = 1e30  # a step so wide that nothing is a step away


@dataclass
class Job:
    """A matrix to encode as one type.

    Attributes:
        weight: fp32 ``[out, in]``.
        type: ggml type.
        where: for errors.
        rows: the encoded rows, uint8 ``[out, row bytes]``.
        error: ``(ŵ − w) H (ŵ − w)ᵀ`` of each row, ``[out]``: its squared output error per token. H is diagonal if no
            more is known.
    """

    weight: torch.Tensor
    type: str
    where: str
    rows: torch.Tensor = field(init=False)
    error: torch.Tensor = field(init=False)


@products(exact=True)
def encode_(jobs: Sequence[Job], importance: torch.Tensor, known: Ordered | None, *, plain: bool) -> None:
    """Encode matrices that share their input, on its device.

    Types with a grid, whose codes can be chosen one by one, get scales of their own, and codes by GPTQ in rows whose
    output error that lowers.

    Args:
        importance: diagonal of the Hessian, ``[in]``.
        known: the Hessian and its factor; None where codes are rounded.
        plain: everything is as llama.cpp chooses it.

    Raises:
        HalfbyteError: what :func:`halfbyte.quant.ggml.types.encode` refuses.
    """
    for job in jobs:
        if has_grid(job.type) and not plain:
            job.rows = choose_rows(job.weight, job.type, importance, where=job.where)
        else:
            rows = encode(job.weight, job.type, importance=importance, where=job.where)
            job.rows = torch.from_numpy(rows.view(np.uint8)).to(job.weight.device)  # F16 comes as numbers
        job.error = output_error(job.weight, job.rows, job.type, importance if known is None else known)
    if plain or known is None:
        return
    even = [job for job in jobs if has_grid(job.type) and GRIDS[job.type].table is None and GRIDS[job.type].bits < FINE]
    for batch in _batches(even):
        _choose_codes_(batch, known, None)
    for table in {GRIDS[job.type].table for job in jobs if has_grid(job.type)} - {None}:
        for batch in _batches([job for job in jobs if has_grid(job.type) and GRIDS[job.type].table == table]):
            _choose_codes_(batch, known, table)


def output_error(
    weight: torch.Tensor, rows: torch.Tensor, type_name: str, known: Ordered | torch.Tensor
) -> torch.Tensor:
    """``(ŵ − w) H (ŵ − w)ᵀ`` of each row, ``[out]``, H without what was added to its diagonal, or diagonal ``[in]``."""
    error = decode_tensor(rows, type_name) - weight
    return known.squares(error) if isinstance(known, Ordered) else error.square() @ known


def _batches(jobs: Sequence[Job]) -> list[list[Job]]:
    batches: list[list[Job]] = []
    room = 0
    for job in jobs:
        if job.weight.numel() > room:
            batches.append([])
            room = TOGETHER
        batches[-1].append(job)
        room -= job.weight.numel()
    return batches


def _choose_codes_(jobs: Sequence[Job], known: Ordered, table: tuple[float, ...] | None) -> None:
    """Replace codes by GPTQ's, row by row where they are better."""
    grids = [grid_of(job.rows, job.type) for job in jobs]
    bits = [GRIDS[job.type].bits for job in jobs]
    if table is None:  # integer codes, centred as the loops want them
        grids = [(step, offset + step * 2 ** (width - 1)) for (step, offset), width in zip(grids, bits, strict=True)]
        each = [torch.full((len(job.weight),), width, dtype=torch.int32) for job, width in zip(jobs, bits, strict=True)]
        codes = torch.cat(each).to(jobs[0].weight.device)
    else:
        codes = torch.tensor(table, dtype=torch.float32, device=jobs[0].weight.device)
    wanted = torch.cat([job.weight - offset for job, (_, offset) in zip(jobs, grids, strict=True)])
    step = torch.cat([step for step, _ in grids])
    del grids
    step = torch.where(step == 0, torch.full_like(step, FAR), step)
    found = feedback_codes(wanted, step, known, codes)
    for _ in range(SWEEPS):
        found = descended_codes(wanted, found, step, known, codes)
    parts = found.split([len(job.weight) for job in jobs])
    for job, part, width in zip(jobs, parts, bits, strict=True):
        if table is None:
            chosen = part + 2 ** (width - 1)
        else:
            chosen = torch.bucketize(part.contiguous(), (codes[1:] + codes[:-1]) / 2)
        rows = with_codes(job.rows, job.type, chosen.to(torch.uint8))
        error = output_error(job.weight, rows, job.type, known)
        better = error < job.error
        job.rows = torch.where(better.unsqueeze(1), rows, job.rows)
        job.error = torch.where(better, error, job.error)
