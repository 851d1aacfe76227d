"""What KL needs to know of the unquantised model, without keeping its logits.

With p the reference's probabilities, o = W h a genome's logits and lse(o) = log Σ exp(o):

    KL = Σ p log p − Σ p (o − lse(o)) = Σ p log p − (Wᵀ p) · h + lse(o)

so per token the sum Σ p log p and the vector Wᵀ p, as long as a hidden state, are all that a genome needs: 42 times
less than logits for Qwen2.5-7B, and the reference's head is never multiplied again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from halfbyte.calibration.walk import run_blocks
from halfbyte.core.precision import products
from halfbyte.models.estimate import HEAD_CHUNK_ROWS, HEAD_CHUNK_TOKENS
from halfbyte.models.families import Family
from halfbyte.models.modules import linear
from halfbyte.quant.hadamard import rotate

CHUNK_TOKENS = {"cuda": HEAD_CHUNK_TOKENS}  # whose fp32 logits exist at once
CHUNK_TOKENS_ELSEWHERE = 128
CHUNK_ROWS = HEAD_CHUNK_ROWS  # of the head, decoded or in fp32 at once


class Rows(Protocol):
    """An output head ``[vocab, hidden]``: a tensor, or a matrix that is made part by part."""

    @property
    def shape(self) -> torch.Size: ...

    def split(self, split_size: int, /) -> Iterable[torch.Tensor]: ...


@dataclass(frozen=True)
class Reference:
    """The unquantised model's answers on the search text.

    Attributes:
        projected: Wᵀ p, fp32 ``[windows, length, hidden]``.
        negentropy: Σ p log p in nats, fp32 ``[windows, length]``.
        final: hidden states that the head reads, ``[windows, length, hidden]``; for models with another head.
    """

    projected: torch.Tensor
    negentropy: torch.Tensor
    final: torch.Tensor | None = None

    def for_rotated(self, final_norm: torch.Tensor) -> Reference:
        """The same for a model whose residual stream is rotated, its final norm's scale ``[hidden]`` in the head.

        W h = W diag(norm) Qᵀ · Q h/norm, so Wᵀ p becomes Q diag(norm) Wᵀ p.
        """
        scale = final_norm.float().to(self.projected.device)
        turned = torch.stack([rotate(window * scale) for window in self.projected])
        return Reference(turned, self.negentropy)

    def split(self, windows: int) -> tuple[Reference, Reference]:
        """The first ``windows``, and the others."""
        parts = (
            (None, None) if tensor is None else tensor.split([windows, len(tensor) - windows])
            for tensor in (self.projected, self.negentropy, self.final)
        )
        first, others = zip(*parts, strict=True)
        return Reference(*first), Reference(*others)

    def for_head(self, original: Rows, other: Rows) -> Reference:
        """The same for a model whose output head is ``other`` ``[vocab, hidden]``.

        Args:
            original: the head that the unquantised model answered with, ``[vocab, hidden]``.
        """
        assert self.final is not None
        parts = token_chunks(self.final.flatten(0, 1))
        projected = torch.cat([_project(original, part, other)[0] for part in parts])
        return Reference(projected.view_as(self.projected), self.negentropy, self.final)

    @products(exact=True)
    def kl(self, head: Rows, final: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """KL of each token of some ``windows`` (their numbers), fp32 ``[tokens]``.

        Args:
            head, final: of the quantised model, ``[vocab, hidden]`` and ``[tokens, hidden]``.
        """
        projected = self.projected[windows].flatten(0, 1)
        return self.negentropy[windows].flatten() - (projected * final.float()).sum(dim=-1) + log_sum_exp(head, final)


def reference(model: nn.Module, family: Family, tokens: torch.Tensor, *, device: torch.device) -> Reference:
    """Run the unquantised model on ``tokens`` ``[windows, length]``, block by block on ``device``."""
    hidden = run_blocks(model, family, tokens, device=device)
    norm = copy.deepcopy(model.get_submodule(family.final_norm)).to(device)
    head = linear(model, family.head).weight.detach().to(device)
    projected, negentropy, finals = [], [], []
    for states in hidden:
        with torch.no_grad():
            final = norm(states).flatten(0, 1)
        finals.append(final)
        for part in token_chunks(final):
            vectors, sums = _project(head, part)
            projected.append(vectors)
            negentropy.append(sums)
    shape = (*tokens.shape, -1)
    return Reference(
        torch.cat(projected).view(shape), torch.cat(negentropy).view(tokens.shape), torch.cat(finals).view(shape)
    )


def token_chunks(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``hidden`` ``[tokens, hidden]`` in parts whose logits may exist at once."""
    return hidden.split(CHUNK_TOKENS.get(hidden.device.type, CHUNK_TOKENS_ELSEWHERE))


def log_sum_exp(head: Rows, hidden: torch.Tensor) -> torch.Tensor:
    """lse(o) of the logits ``[tokens, vocab]`` of ``hidden`` ``[tokens, hidden]``, fp32 ``[tokens]``.

    Only logits of ``CHUNK_ROWS`` words exist at once, and a head that is decoded is never whole.
    """
    parts = [_product(rows, hidden).logsumexp(dim=-1) for rows in head.split(CHUNK_ROWS)]
    return torch.stack(parts).logsumexp(dim=0)


@products(exact=True)
def _product(rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 logits ``[tokens, rows]``; no head of these families has a bias.

    A bf16 product would round the logits, and what that adds to lse(o) has nothing in (Wᵀp)·h to cancel against.
    """
    if rows.dtype == torch.float32:
        return hidden @ rows.T
    if hidden.is_cuda and not (torch.is_grad_enabled() and hidden.requires_grad):  # PyTorch has no derivative of it
        return torch.mm(hidden, rows.T, out_dtype=torch.float32)
    return hidden.float() @ rows.float().T


@products(exact=True)
def _project(head: Rows, hidden: torch.Tensor, onto: Rows | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Wᵀ p and Σ p log p of ``hidden`` ``[tokens, hidden]``; with ``onto`` as W, whose p still is the head's."""
    with torch.no_grad():
        log_p = torch.empty(len(hidden), head.shape[0], dtype=torch.float32, device=hidden.device)  # [tokens, vocab]
        for rows, logits in zip(head.split(CHUNK_ROWS), log_p.split(CHUNK_ROWS, dim=-1), strict=True):
            logits.copy_(_product(rows, hidden))
        log_p = torch.log_softmax(log_p, dim=-1)
        mass = log_p.exp().sum(dim=-1, keepdim=True)  # 1 up to rounding, which lse(o) ≈ 30 would magnify
        log_p -= mass.log()
        p = log_p.exp()
        projected = torch.zeros_like(hidden, dtype=torch.float32)
        other = head if onto is None else onto
        for rows, share in zip(other.split(CHUNK_ROWS), p.split(CHUNK_ROWS, dim=-1), strict=True):
            projected += share @ rows.float()
        return projected, p.mul_(log_p).sum(dim=-1)
