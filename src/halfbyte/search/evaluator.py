"""KL of the whole quantised model against the reference, as a pure function of the genome.

Every evaluation runs the same batches in the same order, so a genome's score never depends on what else is evaluated.

The reference's logits are not kept. With p the reference's probabilities, o = W h a genome's logits and
lse(o) = log Σ exp(o):

    KL = Σ p log p − Σ p (o − lse(o)) = Σ p log p − (Wᵀ p) · h + lse(o)

so per token the sum Σ p log p and the vector Wᵀ p, as long as a hidden state, are all that a genome needs, and the
reference's head is never multiplied again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.calibration.blocks import BlockInputs, call_block, capture, run_blocks
from halfbyte.errors import HalfbyteError
from halfbyte.models.archs import Family
from halfbyte.models.modules import blocks, linear
from halfbyte.models.surgery import set_activation_bits_
from halfbyte.numerics.hadamard import rotate
from halfbyte.spec import Unit

CHUNK_TOKENS = 128  # whose logits exist at once
CHUNK_ROWS = 8192  # of the head, in fp32 at once


@dataclass(frozen=True)
class Reference:
    """What KL needs to know of the unquantised model, per token of the search text.

    Attributes:
        projected: Wᵀ p, fp32 ``[tokens, hidden]``.
        negentropy: Σ p log p in nats, fp32 ``[tokens]``.
    """

    projected: torch.Tensor
    negentropy: torch.Tensor

    def for_rotated(self, final_norm: torch.Tensor) -> Reference:
        """The same for a model whose residual stream is rotated, its final norm's scale ``[hidden]`` in the head.

        W h = W diag(norm) Qᵀ · Q h/norm, so Wᵀ p becomes Q diag(norm) Wᵀ p.
        """
        return Reference(rotate(self.projected * final_norm.float()), self.negentropy)


def reference(
    model: nn.Module, family: Family, tokens: torch.Tensor, *, device: torch.device, batch: int = 1
) -> list[Reference]:
    """Run the unquantised model on ``tokens`` ``[windows, length]``, block by block on ``device``.

    Returns:
        one Reference per batch, on ``device``.
    """
    hidden = run_blocks(model, family, tokens, device=device, batch=batch)
    norm = copy.deepcopy(model.get_submodule(family.final_norm)).to(device)
    head = copy.deepcopy(linear(model, family.head)).to(device)
    found = []
    for states in hidden:
        with torch.no_grad():
            final = norm(states).flatten(0, 1)
        parts = [_project(head, part) for part in final.split(CHUNK_TOKENS)]
        found.append(Reference(torch.cat([part.projected for part in parts]), torch.cat([p.negentropy for p in parts])))
    return found


def _logits(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 logits ``[tokens, vocab]`` of ``hidden`` ``[tokens, hidden]``; no head of these families has a bias.

    A bf16 product would round the logits, and what that adds to lse(o) has nothing in (Wᵀp)·h to cancel against.
    """
    if head.weight.dtype == torch.float32:
        return hidden @ head.weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
    return torch.cat([hidden.float() @ rows.float().T for rows in head.weight.split(CHUNK_ROWS)], dim=-1)


def _project(head: nn.Linear, hidden: torch.Tensor) -> Reference:
    with torch.no_grad():
        log_p = torch.log_softmax(_logits(head, hidden), dim=-1)  # [tokens, vocab]
        mass = log_p.exp().sum(dim=-1, keepdim=True)  # 1 up to rounding, which lse(o) ≈ 30 would magnify
        log_p -= mass.log()
        p = log_p.exp()
        projected = torch.zeros_like(hidden, dtype=torch.float32)
        for rows, share in zip(head.weight.split(CHUNK_ROWS), p.split(CHUNK_ROWS, dim=-1), strict=True):
            projected += share @ rows.float()
        return Reference(projected, (p * log_p).sum(dim=-1))


def _run_blocks(
    model: nn.Module, family: Family, hidden: torch.Tensor, inputs: BlockInputs, *, start: int
) -> torch.Tensor:
    for block in blocks(model, family)[start:]:
        hidden = call_block(block, hidden, inputs.kwargs)
    with torch.no_grad():
        return model.get_submodule(family.final_norm)(hidden)


class KLEvaluator:
    """Scores genomes on ``model``, whose linear layers are already quantised (``QuantLinear``).

    Args:
        model, family: the simulation; its activation bits are set by every call.
        units: one gene per unit.
        tokens: search text, int64 ``[windows, length]``.
        reference: from :func:`reference` of the unquantised model on the same tokens and batch size.
        batch: windows that go through the model at once; always the same, so that scores are reproducible.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        units: Sequence[Unit],
        tokens: torch.Tensor,
        reference: Sequence[Reference],
        *,
        batch: int = 1,
    ) -> None:
        self.model, self.family, self.units = model, family, list(units)
        self.reference = reference
        self.head = linear(model, family.head)
        self.inputs = capture(model, family, tokens, device=next(model.parameters()).device, batch=batch)
        self.evaluations = 0

    def score(self, genome: Sequence[int]) -> float:
        """Mean KL(reference ‖ genome) in nats per token.

        Raises:
            HalfbyteError: the quantised model answers NaN or Inf.
        """
        self._set(dict(zip(self.units, genome, strict=True)))
        total = sum(self._kl(hidden, batch, start=0) for batch, hidden in enumerate(self.inputs.hidden))
        return self._mean(total)

    def one_at_a_time(self, base_bits: int, other_bits: int) -> Iterator[float]:
        """For each unit in order: KL with that unit at ``other_bits`` and all others at ``base_bits``.

        Up to its own block each such genome equals the base, so only the blocks from there on are run: half the work
        of whole evaluations, and the same numbers.
        """
        self._set(dict.fromkeys(self.units, base_bits))
        current = list(self.inputs.hidden)
        for index, block in enumerate(blocks(self.model, self.family)):
            for unit in (unit for unit in self.units if unit.block == index):
                self._set({unit: other_bits})
                total = sum(self._kl(hidden, batch, start=index) for batch, hidden in enumerate(current))
                self._set({unit: base_bits})
                yield self._mean(total)
            current = [call_block(block, hidden, self.inputs.kwargs) for hidden in current]

    def _set(self, bits: dict[Unit, int]) -> None:
        by_layer: dict[str, int | None] = {layer.name: width for unit, width in bits.items() for layer in unit.layers}
        set_activation_bits_(self.model, by_layer)

    def _kl(self, hidden: torch.Tensor, batch: int, *, start: int) -> float:
        """Summed KL of one batch, from block ``start`` on."""
        known = self.reference[batch]
        final = _run_blocks(self.model, self.family, hidden, self.inputs, start=start).flatten(0, 1)
        with torch.no_grad():
            normaliser = torch.cat([_logits(self.head, part).logsumexp(dim=-1) for part in final.split(CHUNK_TOKENS)])
            return float((known.negentropy - (known.projected * final.float()).sum(dim=-1) + normaliser).sum())

    def _mean(self, total: float) -> float:
        self.evaluations += 1
        score = total / sum(part.shape[0] * part.shape[1] for part in self.inputs.hidden)
        if not score < float("inf"):
            raise HalfbyteError(
                "the quantised model answers NaN or Inf", where="search", fix="compute in fp32 (--dtype fp32)"
            )
        return score
