"""KL of the whole quantised model against the reference, as a pure function of the genome.

The W4 weights are the same for all genomes, so one batch may carry windows of many: every row has its own activation
bits. A batch always has the same shape, and nothing is computed across rows, so a row's numbers do not depend on what
else is in the batch, or where. Rows that a batch has too many repeat its last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from halfbyte.calibration.walk import call_block, capture
from halfbyte.core.distributed import processes
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.estimate import windows_at_once
from halfbyte.models.families import Family
from halfbyte.models.layers import Unit
from halfbyte.models.modules import blocks, linear
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.search.problem import Genome
from halfbyte.search.reference import Reference

SEGMENT_TOKENS = 64  # neighbours whose mean is one sample of a loss, at most


class Row(NamedTuple):
    """One row of a batch."""

    genome: Genome
    window: int


class KLEvaluator:
    """Measures genomes on ``model``, whose linear layers are already quantised (``QuantLinear``).

    Args:
        model, family: the simulation; its activation bits are set by every call. Blocks, final norm and head are on
            one device; the embedding may be elsewhere.
        units: one gene per unit.
        tokens: search text, int64 ``[windows, length]``.
        reference: of the unquantised model on the same tokens.
        a_bits: the activation bits that each unit may have, ascending; 4 and 8 by default.
        rows: windows that go through the model at once; always the same, so that scores are reproducible.

    Attributes:
        tick: called after every batch.
        segments: samples of the loss per window, each the mean over the same number of tokens.
        tokens_run: candidate tokens that went through the model in this process; through half of it counts half.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        units: Sequence[Unit],
        tokens: torch.Tensor,
        reference: Reference,
        a_bits: Sequence[Sequence[int]] | None = None,
        *,
        rows: int | None = None,
    ) -> None:
        self.model, self.family, self.units = model, family, list(units)
        self.a_bits = [(4, 8)] * len(self.units) if a_bits is None else [tuple(menu) for menu in a_bits]
        self.reference, self.head = reference, linear(model, family.head)
        self.windows, self.length = tokens.shape
        self.segments = self.length // max(size for size in range(1, SEGMENT_TOKENS + 1) if self.length % size == 0)
        self.device = next(model.get_submodule(family.final_norm).parameters()).device
        self.rows = rows or windows_at_once(self.device, self.length)
        missing = -len(tokens) % self.rows
        repeated = torch.cat([tokens, tokens[-1:].expand(missing, -1)])
        inputs = capture(model, family, repeated, device=self.device, batch=self.rows)
        self._embedded, self._kwargs = torch.cat(inputs.hidden)[: self.windows], inputs.kwargs
        self._known: dict[Row, np.ndarray] = {}
        self.tokens_run = 0.0
        self.tick: Callable[[], None] = lambda: None

    def losses(self, genomes: Sequence[Genome], windows: Iterable[int] | None = None) -> np.ndarray:
        """Mean KL per segment in nats per token, fp64 ``[genomes, windows, segments]``; what is known is not run again.

        Raises:
            HalfbyteError: the quantised model answers NaN or Inf.
        """
        chosen = list(range(self.windows) if windows is None else windows)
        wanted = [Row(tuple(genome), window) for genome in genomes for window in chosen]
        self._run([row for row in dict.fromkeys(wanted) if row not in self._known], self._embedded, start=0)
        found = np.stack([self._known[row] for row in wanted])
        return found.reshape(len(genomes), len(chosen), self.segments)

    def forget(self) -> None:
        """Measure everything anew from here on."""
        self._known.clear()

    def score(self, genome: Genome) -> float:
        """Mean KL(reference ‖ genome) over all windows in nats per token."""
        return float(self.losses([genome]).mean())

    def one_at_a_time(self) -> Iterator[float]:
        """For each unit in order: KL with that unit at its first format and all others at their last.

        Up to its own block each such genome equals the base, so only the blocks from there on are run: half the work
        of whole evaluations, and the same numbers.
        """
        base = self.last_formats
        current = self._embedded
        for index, block in enumerate(blocks(self.model, self.family)):
            genomes = [(*base[:at], 0, *base[at + 1 :]) for at, unit in enumerate(self.units) if unit.block == index]
            rows = [Row(genome, window) for genome in genomes for window in range(self.windows)]
            self._run([row for row in rows if row not in self._known], current, start=index)
            yield from (self.score(genome) for genome in genomes)
            current = self._advance(block, current, base)

    def _advance(self, block: nn.Module, hidden: torch.Tensor, genome: Genome) -> torch.Tensor:
        """Hidden states of all windows after one more block."""
        result = torch.empty_like(hidden)
        for batch in self._batches([Row(genome, window) for window in range(self.windows)]):
            windows = self._set(batch)
            result[windows] = call_block(block, hidden[windows], self._kwargs)
        return result

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        return [list(rows[at : at + self.rows]) for at in range(0, len(rows), self.rows)]

    def _run(self, rows: Sequence[Row], hidden: torch.Tensor, *, start: int) -> None:
        """Measure ``rows`` from block ``start`` on, whose input is ``hidden`` ``[windows, length, hidden]``."""
        batches = self._batches(rows)
        on_device = []
        for batch in processes().share(batches):
            on_device.append(self._kl(batch, hidden, start))
            self._count(batch, start)
        self._learn(batches, on_device)

    def _count(self, batch: Sequence[Row], start: int) -> None:
        """A batch went through the model from block ``start`` on."""
        depth = len(blocks(self.model, self.family))
        self.tokens_run += len(batch) * self.length * (depth - start) / depth
        self.tick()

    def _learn(self, batches: Sequence[Sequence[Row]], on_device: Sequence[torch.Tensor]) -> None:
        """Gather what all processes found of ``batches``; ``on_device`` is this one's share, KL per token."""
        values = [kl.cpu().numpy().astype(np.float64) for kl in on_device]
        found = processes().merge(values)
        for batch, kl in zip(batches, found, strict=True):
            samples = kl.reshape(self.rows, self.segments, -1).mean(axis=-1)
            if not np.isfinite(samples).all():
                raise HalfbyteError(
                    "search: the quantised model answers NaN or Inf", fix="compute in fp32 (--dtype fp32)"
                )
            self._known.update(zip(batch, samples, strict=False))

    def _kl(self, batch: Sequence[Row], hidden: torch.Tensor, start: int) -> torch.Tensor:
        """KL per token, fp32 ``[rows * length]`` on the device."""
        windows = self._set(batch)
        states = hidden[windows]
        for block in blocks(self.model, self.family)[start:]:
            states = call_block(block, states, self._kwargs)
        return self._at_the_end(batch, windows, states)

    def _at_the_end(self, batch: Sequence[Row], windows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """KL per token, from what the last block made."""
        with torch.no_grad():
            final = self.model.get_submodule(self.family.final_norm)(states).flatten(0, 1)
            read = self._read_by_head(final, batch[0].genome)
            return self._reference(batch[0].genome).kl(self.head.weight, read, windows)

    def _read_by_head(self, final: torch.Tensor, genome: Genome) -> torch.Tensor:
        """What the head of ``genome`` multiplies, ``[tokens, hidden]``."""
        return final

    def _reference(self, genome: Genome) -> Reference:
        """The reference for the head that ``genome`` has."""
        return self.reference

    def _set(self, batch: Sequence[Row]) -> torch.Tensor:
        """Give every row its activation bits; returns the window of each, ``[rows]``."""
        table = (
            torch.tensor([self._widths(row.genome) for row in self._padded(batch)], dtype=torch.int32)
            .T.contiguous()
            .to(self.device)
        )
        for unit, bits in zip(self.units, table, strict=True):
            one = int(bits) if self.rows == 1 else bits  # the same numbers, a little quicker
            set_activation_bits_(self.model, dict.fromkeys((layer.name for layer in unit.layers), one))
        return self._windows_of(batch)

    @property
    def last_formats(self) -> Genome:
        """The genome with the most activation bits everywhere."""
        return tuple(len(menu) - 1 for menu in self.a_bits)

    def _widths(self, genome: Genome) -> list[int]:
        """The activation bits of every unit."""
        return [menu[gene] for menu, gene in zip(self.a_bits, genome, strict=True)]

    def _padded(self, batch: Sequence[Row]) -> list[Row]:
        """The batch with its last row repeated to the length that all batches have."""
        return [*batch, *[batch[-1]] * (self.rows - len(batch))]

    def _windows_of(self, batch: Sequence[Row]) -> torch.Tensor:
        """The window of each row, ``[rows]``."""
        return torch.tensor([row.window for row in self._padded(batch)], device=self.device)
