"""What KL needs to know of the unquantised model, without keeping its logits.

With p the reference's probabilities, o = W h a genome's logits and lse(o) = log Σ exp(o):

    KL = Σ p log p − Σ p (o − lse(o)) = Σ p log p − (Wᵀ p) · h + lse(o)

so per token the sum Σ p log p and the vector Wᵀ p, as long as a hidden state, are all that a genome needs: 42 times
less than logits for Qwen2.5-7B, and the reference's head is never multiplied again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.calibration.blocks import run_blocks
from halfbyte.models.archs import Family
from halfbyte.models.modules import linear
from halfbyte.numerics.hadamard import rotate

CHUNK_TOKENS = {"cuda": 1024}  # whose fp32 logits exist at once
CHUNK_TOKENS_ELSEWHERE = 128
CHUNK_ROWS = 8192  # of the head, in fp32 at once


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

    def for_head(self, original: torch.Tensor, other: torch.Tensor) -> Reference:
        """The same for a model whose output head is ``other`` ``[vocab, hidden]`` in place of ``original``."""
        assert self.final is not None
        head = nn.Linear(*original.shape[::-1], bias=False, device="meta")
        head.weight = nn.Parameter(original, requires_grad=False)
        parts = token_chunks(self.final.flatten(0, 1))
        projected = torch.cat([_project(head, part, other)[0] for part in parts])
        return Reference(projected.view_as(self.projected), self.negentropy, self.final)


def reference(
    model: nn.Module, family: Family, tokens: torch.Tensor, *, device: torch.device, batch: int = 1
) -> Reference:
    """Run the unquantised model on ``tokens`` ``[windows, length]``, block by block on ``device``."""
    hidden = run_blocks(model, family, tokens, device=device, batch=batch)
    norm = copy.deepcopy(model.get_submodule(family.final_norm)).to(device)
    head = copy.deepcopy(linear(model, family.head)).to(device)
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


def logits(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 logits ``[tokens, vocab]`` of ``hidden`` ``[tokens, hidden]``; no head of these families has a bias.

    A bf16 product would round the logits, and what that adds to lse(o) has nothing in (Wᵀp)·h to cancel against.
    """
    if head.weight.dtype == torch.float32:
        return hidden @ head.weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
    return torch.cat([hidden.float() @ rows.float().T for rows in head.weight.split(CHUNK_ROWS)], dim=-1)


def _project(
    head: nn.Linear, hidden: torch.Tensor, onto: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wᵀ p and Σ p log p of ``hidden`` ``[tokens, hidden]``; with ``onto`` as W, whose p still is the head's."""
    weight = head.weight if onto is None else onto
    with torch.no_grad():
        log_p = torch.log_softmax(logits(head, hidden), dim=-1)  # [tokens, vocab]
        mass = log_p.exp().sum(dim=-1, keepdim=True)  # 1 up to rounding, which lse(o) ≈ 30 would magnify
        log_p -= mass.log()
        p = log_p.exp()
        projected = torch.zeros_like(hidden, dtype=torch.float32)
        for rows, share in zip(weight.split(CHUNK_ROWS), p.split(CHUNK_ROWS, dim=-1), strict=True):
            projected += share @ rows.float()
        return projected, (p * log_p).sum(dim=-1)
