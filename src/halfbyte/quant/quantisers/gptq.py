"""GPTQ: round column by column, and let later columns make up for the error of earlier ones.

Frantar et al. 2022 (arXiv:2210.17323), in the form of Chee et al. 2023 (QuIP, arXiv:2307.13304): with the Hessian
H = (I + U) D (I + U)ᵀ, U strictly upper triangular, column k is rounded from ``w_k + Σ_{j<k} (w_j − ŵ_j) U_jk``. That
gives the same codes with one Cholesky factorisation and no inverse. Columns are taken in the order of falling diag(H)
("act order") while groups stay where they are, so their scales are chosen before, by output error.

What is rounded is not W but W + β E[W (x − x̂) x̂ᵀ] H⁻¹, which makes up for what the quantised blocks before did to the
input (Li et al. 2025, GPTAQ, arXiv:2504.02692). β = 1 is the least-squares answer; it also shrinks outputs wherever the
input is noisy, which adds up over blocks: on unseen text 0.5 was better than 0 and than 1, and less than that for few
tokens (``benchmarks/drift.py``).

Afterwards each code in turn becomes the best one given all others, and scales are solved for by least squares.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.core.precision import products
from halfbyte.quant.grids import INT4, Grid
from halfbyte.quant.int4 import ANY_FP16, GroupedWeight, ScaleRule, encode_with_scales, searched_scales
from halfbyte.quant.kernels import Codes, descend_columns, round_columns
from halfbyte.quant.quantisers import InputMoments, WeightQuantiser

BLOCK = 128  # columns between two matrix products
DAMPING = (0.01, 0.1, 1.0)  # shares of the mean diagonal, tried in turn
CORRECTION = 0.5  # β
ENOUGH_TOKENS = 16384  # for all of it; of fewer, what they say of the drift is partly chance
SWEEPS = 2  # of coordinate descent


class NotPositive(ArithmeticError):
    """The Hessian has no Cholesky factorisation."""


class Ordered:
    """A Hessian in the order in which columns are rounded, and its factor.

    Both are kept from the last column to the first, where U is the lower Cholesky factor with columns divided by the
    diagonal, and slices are turned around when asked for: a second copy would be 1.4 GB for 18,944 columns.

    Attributes:
        order: column indices by falling diagonal.
        back: where each column went.
    """

    def __init__(self, hessian: torch.Tensor) -> None:
        self.order = torch.argsort(hessian.diagonal(), descending=True)
        self.back = torch.argsort(self.order)
        last_first = self.order.flip(0)
        self._mean = hessian.diagonal().mean()
        self._hessian = hessian[last_first]
        for rows in self._hessian.split(BLOCK):
            rows.copy_(rows[:, last_first])
        self._damping = 0.0
        self._factor = hessian.new_empty(0)

    def factorise(self, damping: float) -> None:
        """Add ``damping`` times the mean diagonal in all to the diagonal, and factorise.

        Raises:
            NotPositive: the Hessian is not positive definite.
        """
        self._hessian.diagonal().add_((damping - self._damping) * self._mean)
        self._damping, self._factor = damping, self._factor.new_empty(0)
        self._factor, info = torch.linalg.cholesky_ex(self._hessian)
        if int(info) or not bool(torch.isfinite(self._factor.diagonal()).all()):
            raise NotPositive(int(info))

    @property
    def added(self) -> torch.Tensor:
        """What was added to each element of the diagonal."""
        return self._damping * self._mean

    def _turned(self, matrix: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        n = len(matrix)
        return matrix[n - rows.stop : n - rows.start, n - columns.stop : n - columns.start].flip(0, 1)

    def hessian(self, rows: slice, columns: slice) -> torch.Tensor:
        """Part of the Hessian, in the order of rounding."""
        return self._turned(self._hessian, rows, columns)

    def mix(self, rows: slice, columns: slice) -> torch.Tensor:
        """Part of U, in the order of rounding, where it is not zero by definition (``rows.stop <= columns.stop``)."""
        part = self._turned(self._factor, rows, columns) / self._factor.diagonal().flip(0)[columns]
        return part.triu(1) if rows == columns else part

    def squares(self, error: torch.Tensor) -> torch.Tensor:
        """``e H eᵀ`` for each row e of ``error`` ``[out, in]``, H without what was added to its diagonal: ``[out]``."""
        error = error[:, self.order.flip(0)]
        return ((error @ self._hessian - self.added * error) * error).sum(-1)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows of the Hessian, with rows and columns in the usual order: ``[len(rows), in]``."""
        where = len(self._hessian) - 1 - self.back
        return self._hessian[where[rows]][:, where]

    def divide(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows H⁻¹`` for ``[out, in]`` in the usual order of columns."""
        flipped = rows[:, self.order].flip(1)
        return torch.cholesky_solve(flipped.T, self._factor).T.flip(1)[:, self.back]


def round_with_feedback(weight: torch.Tensor, scales: torch.Tensor, known: Ordered, grid: Grid = INT4) -> GroupedWeight:
    """4-bit codes of ``weight`` ``[out, in]`` on given fp16 ``scales`` ``[out, groups]``, by GPTQ."""
    step = _per_column(scales, weight.shape[1])
    codes = feedback_codes(weight.float(), step, known, grid.choices(weight.device))
    return GroupedWeight(codes.to(torch.int8).contiguous(), scales, grid=grid)


def improve_codes(weight: torch.Tensor, encoded: GroupedWeight, known: Ordered) -> GroupedWeight:
    """One sweep of coordinate descent over the codes; ``(ŵ − w) H (ŵ − w)ᵀ`` never grows."""
    step = _per_column(encoded.scales, weight.shape[1])
    choices = encoded.bits if encoded.grid.even else encoded.grid.choices(weight.device)
    codes = descended_codes(weight.float(), encoded.codes.float(), step, known, choices)
    return replace(encoded, codes=codes.to(torch.int8).contiguous())


def feedback_codes(weight: torch.Tensor, step: torch.Tensor, known: Ordered, codes: Codes) -> torch.Tensor:
    """What GPTQ makes of ``weight`` where ``ŵ = code · step``, fp32 ``[out, in]`` like all of these.

    Args:
        step: not 0.
        codes: which ones there are.
    """
    step, w = step[:, known.order], weight[:, known.order]
    error = torch.zeros_like(w)  # w − ŵ of the columns done
    found = torch.empty_like(w)
    for columns in _blocks(w.shape[1]):
        done = slice(0, columns.start)
        target = w[:, columns] + error[:, done] @ known.mix(done, columns)
        inside = known.mix(columns, columns)
        found[:, columns], error[:, columns] = round_columns(target, w[:, columns], step[:, columns], inside, codes)
    return found[:, known.back]


def descended_codes(
    weight: torch.Tensor, found: torch.Tensor, step: torch.Tensor, known: Ordered, codes: Codes
) -> torch.Tensor:
    """``found`` after every code in turn was moved to its best value given all others; as :func:`feedback_codes`."""
    step, found = step[:, known.order], found[:, known.order]
    error = weight[:, known.order] - found * step
    every = slice(0, found.shape[1])
    for columns in _blocks(found.shape[1]):
        pull = error @ known.hessian(every, columns)  # half the gradient
        inside = known.hessian(columns, columns)
        new = descend_columns(pull, found[:, columns], step[:, columns], inside, codes)
        error[:, columns] -= (new - found[:, columns]) * step[:, columns]
        found[:, columns] = new
    return found[:, known.back]


def improve_scales(
    weight: torch.Tensor, encoded: GroupedWeight, known: Ordered, rule: ScaleRule = ANY_FP16
) -> GroupedWeight:
    """The scales with the least ``(ŵ − w) H (ŵ − w)ᵀ`` for the codes as they are, rounded; a row for which they
    cannot be had, or break the ``rule``, keeps its own."""
    rows, groups, size = weight.shape[0], encoded.scales.shape[1], encoded.group_size
    w, codes = weight.float(), encoded.codes.float()
    system, wanted = w.new_empty(rows, groups, groups), w.new_empty(rows, groups)
    for g, part in enumerate(torch.arange(weight.shape[1], device=weight.device).split(size)):
        hessian = known.rows(part)  # [group, in]
        mine, rest = codes[:, g * size : (g + 1) * size], codes[:, g * size :]
        wanted[:, g] = ((w @ hessian.T) * mine).sum(-1)
        products = ((mine @ hessian[:, g * size :]) * rest).view(rows, -1, size).sum(-1)
        system[:, g, g:], system[:, g:, g] = products, products  # it is symmetric
    size_of = system.diagonal(dim1=1, dim2=2)
    size_of += (1e-6 * size_of.mean(-1, keepdim=True)).clamp_min(1e-30)
    scales, info = torch.linalg.solve_ex(system, wanted)
    scales = rule.fitted(rule.rounded(scales), known=encoded.scales)
    legal = torch.isfinite(scales) & ((scales >= 0) | rule.signed)
    good = (info == 0).unsqueeze(-1) & legal.all(-1, keepdim=True)
    return replace(encoded, scales=torch.where(good, scales, encoded.scales))


def descend_scales(
    weight: torch.Tensor, encoded: GroupedWeight, known: Ordered, rule: ScaleRule = ANY_FP16
) -> GroupedWeight:
    """Each group's scale in turn becomes the best that the ``rule`` has, given codes and all other scales.

    For scales so coarse that solving for all of them and rounding would lose; here the error never grows.
    """
    codes = encoded.codes.float().view(len(weight), -1, encoded.group_size)  # [out, groups, group]
    scales = encoded.scales.float().clone()
    error = weight.float() - encoded.decode()
    for g, part in enumerate(torch.arange(weight.shape[1], device=weight.device).split(encoded.group_size)):
        hessian, mine, here = known.rows(part), codes[:, g], scales[:, g]
        curve = ((mine @ hessian[:, part]) * mine).sum(-1).clamp_min(1e-30)
        best = here + ((error @ hessian.T) * mine).sum(-1) / curve
        new = rule.fitted(rule.rounded(best.clamp_min(0).unsqueeze(-1)), known=encoded.scales).float().squeeze(-1)
        new = torch.where((new - best).abs() < (here - best).abs(), new, here)
        error[:, part] -= (new - here).unsqueeze(-1) * mine
        scales[:, g] = new
    return replace(encoded, scales=scales.to(encoded.scales.dtype))


def output_error(weight: torch.Tensor, encoded: GroupedWeight, hessian: torch.Tensor) -> float:
    """Mean over outputs of ``(ŵ − w) H (ŵ − w)ᵀ``: the squared error per output and token."""
    error = encoded.decode() - weight.float()
    return float(((error @ hessian) * error).sum() / weight.shape[0])


def damped(known: Ordered) -> float | None:
    """Factorise with as little of ``DAMPING`` as that needs; which it was, or None if none helps."""
    for damping in DAMPING:
        try:
            known.factorise(damping)
        except NotPositive:
            continue
        return damping
    return None


def factorised(known: Ordered) -> Ordered:
    """``known``, factorised; where no damping helps, the identity: feedback then changes nothing."""
    if damped(known) is not None:
        return known
    identity = Ordered(torch.eye(len(known.order), device=known.order.device))
    identity.factorise(0.0)
    return identity


@products(exact=True)
def corrected(moments: InputMoments, known: Ordered) -> torch.Tensor:
    """``W + β E[W (x − x̂) x̂ᵀ] H⁻¹``, ``[out, in]``: what is rounded.

    Args:
        known: the Hessian of the moments, factorised.
    """
    share = CORRECTION * min(1.0, moments.tokens / ENOUGH_TOKENS)
    return moments.weight + share * known.divide(moments.drift)


@products(exact=True)
def quantise(
    weight: torch.Tensor, group_size: int, moments: InputMoments, *, where: object, rule: ScaleRule = ANY_FP16
) -> tuple[GroupedWeight, str]:
    """Codes of ``weight``, and a note if the Hessian needed more damping or could not be used at all."""
    importance = moments.hessian.diagonal().clone()
    known = Ordered(moments.take_hessian())
    damping = damped(known)
    if damping is None:
        scales = searched_scales(weight, group_size, importance, rule=rule, where=where)
        nearest = encode_with_scales(weight, scales, grid=rule.grid)
        return nearest, "rounded to nearest: the Hessian is not positive definite"
    target = corrected(moments, known)
    scales = searched_scales(target, group_size, importance, rule=rule, where=where)
    encoded = round_with_feedback(target, scales, known, rule.grid)
    for sweep in range(SWEEPS):
        if sweep:
            improve = improve_scales if rule.grid.even else descend_scales
            encoded = improve(target, encoded, known, rule)
        encoded = improve_codes(target, encoded, known)
    return encoded, "" if damping == DAMPING[0] else f"GPTQ with damping {damping:g}"


def _encode(
    moments: InputMoments, group_size: int, where: object, rule: ScaleRule = ANY_FP16
) -> tuple[GroupedWeight, str]:
    return quantise(moments.weight, group_size, moments, where=where, rule=rule)


QUANTISER = WeightQuantiser(_encode, looks_at_inputs=True, rounding_share=0.3)


def _blocks(columns: int) -> list[slice]:
    """Consecutive slices whose lengths are powers of two, at most ``BLOCK``."""
    found, start = [], 0
    while start < columns:
        size = min(BLOCK, 1 << ((columns - start).bit_length() - 1))
        found.append(slice(start, start + size))
        start += size
    return found


def _per_column(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales repeated for every column, fp32 ``[out, in]``; 0 (an empty group) becomes so wide that its codes are 0."""
    step = scales.float().repeat_interleave(columns // scales.shape[1], dim=1)
    return torch.where(step == 0, torch.full_like(step, 1e30), step)
