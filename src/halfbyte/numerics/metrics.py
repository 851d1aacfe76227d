"""How far one model's answers are from another's: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def kl_per_token(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ model) in nats for each row of ``[tokens, vocab]``, fp32 ``[tokens]``."""
    reference = torch.log_softmax(reference_logits.float(), dim=-1)
    return (reference.exp() * (reference - torch.log_softmax(logits.float(), dim=-1))).sum(dim=-1)


def same_top(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether both rows of ``[tokens, vocab]`` have the same most likely token, bool ``[tokens]``."""
    return reference_logits.argmax(dim=-1) == logits.argmax(dim=-1)


def nll_per_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of ``targets`` ``[tokens]`` under ``[tokens, vocab]``, fp32 ``[tokens]``."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@dataclass(frozen=True)
class Quality:
    """Summary over all scored tokens.

    Attributes:
        ppl: perplexity of the model; ppl_reference: of the reference (None without one).
        kld_mean, kld_p99: KL divergence to the reference, nats per token (None without one).
        top1_agreement: share of tokens with the same most likely token (None without one).
        tokens: tokens scored.
        kld_error: standard error of kld_mean.
    """

    ppl: float
    tokens: int
    ppl_reference: float | None = None
    kld_mean: float | None = None
    kld_p99: float | None = None
    top1_agreement: float | None = None
    kld_error: float | None = None


class QualityMeter:
    """Collects per-token values chunk by chunk, and sums them up."""

    def __init__(self) -> None:
        self._nll: list[torch.Tensor] = []
        self._reference_nll: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._same: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor | None = None) -> None:
        """Score one chunk: ``logits`` ``[tokens, vocab]``, ``targets`` ``[tokens]``, reference like ``logits``."""
        self._nll.append(nll_per_token(logits, targets).cpu())
        if reference_logits is not None:
            self._reference_nll.append(nll_per_token(reference_logits, targets).cpu())
            self._kl.append(kl_per_token(reference_logits, logits).cpu())
            self._same.append(same_top(reference_logits, logits).cpu())

    def result(self) -> Quality:
        """The summary of everything added so far."""
        nll = torch.cat(self._nll)
        ppl = float(nll.mean().exp())
        if not self._kl:
            return Quality(ppl=ppl, tokens=nll.numel())
        kl = torch.cat(self._kl)
        return Quality(
            ppl=ppl,
            tokens=nll.numel(),
            ppl_reference=float(torch.cat(self._reference_nll).mean().exp()),
            kld_mean=float(kl.mean()),
            kld_p99=float(torch.quantile(kl, 0.99)),
            top1_agreement=float(torch.cat(self._same).float().mean()),
            kld_error=float(kl.std() / kl.numel() ** 0.5),
        )
