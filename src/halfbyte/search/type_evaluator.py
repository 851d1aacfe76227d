"""KL of a model whose matrices are encoded as ggml types, as a pure function of the genome.

A gene is a place in the menu of its matrix, or ``ORIGINAL``. Activations are left alone: what llama.cpp does to them
is the same for every type. Weights are decoded where the model is, and only those that the next genome has otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from halfbyte.calibration.blocks import capture
from halfbyte.formats.encoded import Encoded
from halfbyte.formats.ggml import decode_tensor
from halfbyte.models.archs import Family
from halfbyte.models.modules import blocks, is_tied, linear
from halfbyte.parallel import ALONE, Group
from halfbyte.search.evaluator import KLEvaluator, Row
from halfbyte.search.problem import Genome
from halfbyte.search.reference import Reference

ORIGINAL: int = -1


class Matrix(Protocol):
    """A matrix and its menu (``halfbyte.prepare.menus.TensorMenu``)."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int: ...

    @property
    def types(self) -> tuple[str, ...]: ...


class MixedTypes:
    """A model on a device, and the types that its matrices have at the moment.

    Unquantised weights stay where they were; the device holds what is in use.

    Args:
        model, family: unquantised, with the transforms that ``encoded`` was made for; it moves to ``device``.
        matrices: one gene each, in the order of the model: embedding, blocks, an untied head.
        encoded: every matrix in all types of its menu.
    """

    def __init__(
        self, model: nn.Module, family: Family, matrices: Sequence[Matrix], encoded: Encoded, device: torch.device
    ) -> None:
        self.model, self.family, self.matrices, self.encoded = model, family, list(matrices), encoded
        self.embedding = next(at for at, matrix in enumerate(matrices) if matrix.name == family.embedding)
        names = [matrix.name for matrix in matrices]
        self.head = names.index(family.head) if family.head in names else self.embedding  # tied to it
        self.original: Genome = (ORIGINAL,) * len(self.matrices)
        self.device = device
        self._weights = {matrix.name: linear(model, matrix.name).weight for matrix in matrices}
        self._tied = is_tied(model, family)
        self._loaded: list[int] = list(self.original)
        for at in range(len(self.matrices)):
            self._load(at, ORIGINAL)
        model.to(device)

    def load(self, genome: Genome) -> None:
        """Give the model the weights of ``genome``."""
        for at, gene in enumerate(genome):
            self.put(at, gene)

    def put(self, at: int, gene: int) -> None:
        """Give one matrix another type."""
        if gene != self._loaded[at]:
            self._load(at, gene)
            self._loaded[at] = gene

    def unquantised(self, at: int) -> torch.Tensor:
        """The weight of a matrix as it was, on the device."""
        return self._weights[self.matrices[at].name].to(self.device)

    def _load(self, at: int, gene: int) -> None:
        matrix = self.matrices[at]
        value = original = self._weights[matrix.name]
        if gene != ORIGINAL:
            rows = self.encoded.rows(matrix.name, matrix.types[gene]).to(self.device)
            value = decode_tensor(rows, matrix.types[gene])
        weight = nn.Parameter(value.to(self.device, original.dtype), requires_grad=False)
        linear(self.model, matrix.name).weight = weight
        if self._tied and at == self.embedding:
            linear(self.model, self.family.head).weight = weight


class TypeEvaluator(KLEvaluator):
    """Measures genomes.

    Args:
        mixed: the model; evaluators may share it.
        tokens, reference, rows, group: see :class:`halfbyte.search.evaluator.KLEvaluator`.
    """

    def __init__(
        self,
        mixed: MixedTypes,
        tokens: torch.Tensor,
        reference: Reference,
        *,
        rows: int | None = None,
        group: Group = ALONE,
    ) -> None:
        mixed.load(mixed.original)
        super().__init__(mixed.model, mixed.family, [], tokens, reference, rows=rows, group=group)
        self.mixed, self._tokens = mixed, tokens
        self._first = {ORIGINAL: self._embedded}  # gene of the embedding -> first hidden states
        self._references = {ORIGINAL: reference}  # gene of the head -> what is known of the unquantised model

    def each_alone(self, genes: Sequence[int]) -> Iterator[tuple[int, float]]:
        """(place, KL) for each matrix with its gene from ``genes`` and all others as they were, in any order.

        Up to its own block each such model is the original, so only the blocks from there on are run.
        """
        matrices, original = self.mixed.matrices, self.mixed.original

        def measure(places: Iterable[int], hidden: torch.Tensor, start: int) -> Iterator[tuple[int, float]]:
            for at in places:
                genome = (*original[:at], genes[at], *original[at + 1 :])
                rows = [Row(genome, window) for window in range(self.windows)]
                self._run([row for row in rows if row not in self._known], hidden, start=start)
                yield at, self.score(genome)

        def places(block: int) -> list[int]:
            return [at for at, matrix in enumerate(matrices) if matrix.block == block]

        current, layers = self._embedded, blocks(self.model, self.family)
        yield from measure([self.mixed.embedding], current, 0)
        for index, block in enumerate(layers):
            yield from measure(places(index), current, index)
            current = self._advance(block, current, original)
        head = [at for at, matrix in enumerate(matrices) if matrix.name == self.family.head]
        yield from measure(head, current, len(layers))

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of one genome at a time."""
        by_genome: dict[Genome, list[Row]] = {}
        for row in rows:
            by_genome.setdefault(row.genome, []).append(row)
        return [batch for own in by_genome.values() for batch in super(TypeEvaluator, self)._batches(own)]

    def _set(self, batch: Sequence[Row]) -> torch.Tensor:
        self.mixed.load(batch[0].genome)
        full = [*batch, *[batch[-1]] * (self.rows - len(batch))]
        return torch.tensor([row.window for row in full], device=self.device)

    def _kl(self, batch: Sequence[Row], hidden: torch.Tensor, start: int) -> torch.Tensor:
        return super()._kl(batch, self._hidden(batch[0].genome) if start == 0 else hidden, start)

    def _reference(self, genome: Genome) -> Reference:
        gene = genome[self.mixed.head]
        if gene not in self._references:
            original = self.mixed.unquantised(self.mixed.head)
            self._references[gene] = self.reference.for_head(original, self.head.weight)
        return self._references[gene]

    def _hidden(self, genome: Genome) -> torch.Tensor:
        """First hidden states with the embedding that ``genome`` has."""
        gene = genome[self.mixed.embedding]
        if gene not in self._first:
            self.mixed.put(self.mixed.embedding, gene)
            inputs = capture(self.model, self.family, self._tokens, device=self.device, batch=self.rows)
            self._first[gene] = torch.cat(inputs.hidden)
        return self._first[gene]
