"""KL of the whole quantised model against the reference, as a pure function of the genome.

Every evaluation runs the same batches in the same order, so a genome's score never depends on what else is evaluated.
The reference is kept as final hidden states, and KL is computed a few tokens at a time, so that logits over the whole
vocabulary never exist for the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from halfbyte.calibration.blocks import BlockInputs, call_block, capture
from halfbyte.errors import HalfbyteError
from halfbyte.models.archs import Family
from halfbyte.models.surgery import set_activation_bits_
from halfbyte.numerics.metrics import kl_per_token
from halfbyte.spec import Unit

CHUNK_TOKENS = 256


def reference_hidden(model: nn.Module, family: Family, tokens: torch.Tensor, *, batch: int = 1) -> list[torch.Tensor]:
    """Final normed hidden states of the unquantised model, one ``[windows, length, hidden]`` per batch."""
    device = next(model.parameters()).device
    inputs = capture(model, family, tokens, device=device, batch=batch)
    return [_run_blocks(model, family, hidden, inputs, start=0) for hidden in inputs.hidden]


def _run_blocks(
    model: nn.Module, family: Family, hidden: torch.Tensor, inputs: BlockInputs, *, start: int
) -> torch.Tensor:
    for block in list(model.get_submodule(family.blocks).children())[start:]:
        hidden = call_block(block, hidden, inputs.kwargs)
    with torch.no_grad():
        return model.get_submodule(family.final_norm)(hidden)


class KLEvaluator:
    """Scores genomes on ``model``, whose linear layers are already quantised (``QuantLinear``).

    Args:
        model, family: the simulation; its activation bits are set by every call.
        units: one gene per unit.
        tokens: search text, int64 ``[windows, length]``.
        reference: from :func:`reference_hidden` of the unquantised model on the same tokens and batch size.
        symmetric: symmetric activation codes.
        batch: windows that go through the model at once; always the same, so that scores are reproducible.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        units: Sequence[Unit],
        tokens: torch.Tensor,
        reference: Sequence[torch.Tensor],
        *,
        symmetric: bool = False,
        batch: int = 1,
    ) -> None:
        self.model, self.family, self.units, self.symmetric = model, family, list(units), symmetric
        self.reference = reference
        self.head = model.get_submodule(family.head)
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
        blocks = list(self.model.get_submodule(self.family.blocks).children())
        current = list(self.inputs.hidden)
        for index, block in enumerate(blocks):
            for unit in (unit for unit in self.units if unit.block == index):
                self._set({unit: other_bits})
                total = sum(self._kl(hidden, batch, start=index) for batch, hidden in enumerate(current))
                self._set({unit: base_bits})
                yield self._mean(total)
            current = [call_block(block, hidden, self.inputs.kwargs) for hidden in current]

    def _set(self, bits: dict[Unit, int]) -> None:
        by_layer: dict[str, int | None] = {layer.name: width for unit, width in bits.items() for layer in unit.layers}
        set_activation_bits_(self.model, by_layer, symmetric=self.symmetric)

    def _kl(self, hidden: torch.Tensor, batch: int, *, start: int) -> float:
        """Summed KL of one batch, from block ``start`` on."""
        final = _run_blocks(self.model, self.family, hidden, self.inputs, start=start).flatten(0, 1)
        reference = self.reference[batch].flatten(0, 1)
        total = 0.0
        for ours, theirs in zip(final.split(CHUNK_TOKENS), reference.split(CHUNK_TOKENS), strict=True):
            with torch.no_grad():
                total += float(kl_per_token(self.head(theirs), self.head(ours)).sum())
        return total

    def _mean(self, total: float) -> float:
        self.evaluations += 1
        score = total / sum(part.shape[0] * part.shape[1] for part in self.inputs.hidden)
        if not score < float("inf"):
            raise HalfbyteError(
                "the quantised model answers NaN or Inf", where="search", fix="compute in fp32 (--dtype fp32)"
            )
        return score
