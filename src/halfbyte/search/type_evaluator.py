"""KL of a model whose matrices are encoded as ggml types, as a pure function of the genome.

A gene is a place in the menu of its matrix, or ``ORIGINAL``. Inputs of a matrix are rounded as llama.cpp rounds them on
a CPU for its type. Weights are decoded where the model is, and only those that the next genome has otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from halfbyte.calibration.walk import call_block, capture
from halfbyte.core.distributed import processes
from halfbyte.core.environment import available_memory
from halfbyte.models.estimate import SIDE_BY_SIDE
from halfbyte.models.families import Family
from halfbyte.models.modules import blocks, is_tied, linear
from halfbyte.quant.ggml.encoded import Encoded, StoredLinear, StoredMatrix, store_matrix_
from halfbyte.quant.ggml.inputs import InputRounding, input_block, rounded_inputs
from halfbyte.quant.ggml.types import decode_tensor
from halfbyte.search.evaluator import KLEvaluator, Row
from halfbyte.search.problem import Genome
from halfbyte.search.reference import Reference

ORIGINAL: int = -1


class Matrix(Protocol):
    """A matrix and its menu (``halfbyte.prepare.candidates.TensorMenu``)."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int: ...

    @property
    def types(self) -> tuple[str, ...]: ...


class MixedTypes:
    """A model on a device, and the types that its matrices have at the moment.

    Unquantised weights stay where they were; the device holds what is in use, decoded or as it is encoded.

    Args:
        model, family: unquantised, with the transforms that ``encoded`` was made for; it moves to ``device``.
        matrices: one gene each, in the order of the model: embedding, blocks, an untied head.
        encoded: every matrix in all types of its menu.
        packed: keep encoded rows on the device and decode them at every product, for the same numbers; what is not
            quantised comes from where it was for every product.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        matrices: Sequence[Matrix],
        encoded: Encoded,
        device: torch.device,
        *,
        packed: bool = False,
    ) -> None:
        self.model, self.family, self.matrices, self.encoded = model, family, list(matrices), encoded
        self.embedding = next(at for at, matrix in enumerate(matrices) if matrix.name == family.embedding)
        names = [matrix.name for matrix in matrices]
        self.head = names.index(family.head) if family.head in names else self.embedding  # tied to it
        self.original: Genome = (ORIGINAL,) * len(self.matrices)
        self.device, self.packed = device, packed
        self._weights = {matrix.name: linear(model, matrix.name).weight for matrix in matrices}
        self._tied = is_tied(model, family)
        self._loaded: list[int] = list(self.original)
        self._held: dict[int, torch.Tensor] = {}
        self._stored = [store_matrix_(model, name, device) for name in names] if packed else []
        if packed and self._tied:
            model.set_submodule(family.head, StoredLinear(self._stored[self.embedding], None))
        inside = [at for at, matrix in enumerate(matrices) if matrix.block >= 0]
        self._rounding = {at: InputRounding(model.get_submodule(names[at])) for at in inside}
        for at in range(len(self.matrices)):
            self._load(at, ORIGINAL)
        model.to(device)  # of a packed one: norms and biases
        self._keeps, self._kept = not packed and self._has_room(), dict[tuple[str, str], torch.Tensor]()

    def _has_room(self) -> bool:
        """Whether a GPU has room for all candidates as they are encoded, and as much again."""
        if self.device.type != "cuda":
            return False
        sizes = (self.encoded.rows(one.name, kind).nbytes for one in self.matrices for kind in one.types)
        return 2 * sum(sizes) < available_memory(self.device)

    def _rows(self, name: str, kind: str) -> torch.Tensor:
        """Encoded rows, on the device unless the model is packed; where there is room they stay there."""
        found = self._kept.get((name, kind))
        if found is None:
            found = self.encoded.rows(name, kind)
            if not self.packed:
                found = found.to(self.device)
            if self._keeps:
                self._kept[name, kind] = found
        return found

    def load(self, genome: Genome) -> None:
        """Give the model the weights of ``genome``."""
        for at, gene in enumerate(genome):
            self.put(at, gene)

    def put(self, at: int, gene: int) -> None:
        """Give one matrix another type."""
        if gene != self._loaded[at]:
            self._load(at, gene)
            self._loaded[at] = gene

    @contextmanager
    def held(self, block: int) -> Iterator[None]:
        """Inside, the unquantised weights of a block are on the device, whatever its matrices are put to."""
        own = [at for at, matrix in enumerate(self.matrices) if matrix.block == block]
        for at in own:
            if self.packed:
                self._stored[at].hold_(on_device=True)
            elif self._loaded[at] == ORIGINAL:
                self._held[at] = linear(self.model, self.matrices[at].name).weight
        try:
            yield
        finally:
            self._held.clear()
            for at in own if self.packed else ():
                self._stored[at].hold_(on_device=False)

    def input_block(self, at: int, gene: int) -> int:
        """How the inputs of a matrix are rounded; see :func:`halfbyte.quant.ggml.inputs.rounded_inputs`."""
        return 0 if gene == ORIGINAL else input_block(self.matrices[at].types[gene])

    def unquantised(self, at: int) -> torch.Tensor:
        """The weight of a matrix as it was, where it was."""
        return self._weights[self.matrices[at].name]

    def _load(self, at: int, gene: int) -> None:
        matrix = self.matrices[at]
        if at in self._rounding:
            self._rounding[at].block = self.input_block(at, gene)
        original, kind = self._weights[matrix.name], "" if gene == ORIGINAL else matrix.types[gene]
        rows = self._rows(matrix.name, kind) if kind else None
        if self.packed:
            looked_up = at == self.embedding and not self._tied  # a few rows for every window
            self._stored[at].encode_as_(rows if looked_up or rows is None else rows.to(self.device), kind)
            return
        value = self._held.get(at, original) if rows is None else decode_tensor(rows, kind, original.dtype)
        weight = nn.Parameter(value.to(self.device), requires_grad=False)
        linear(self.model, matrix.name).weight = weight
        if self._tied and at == self.embedding:
            linear(self.model, self.family.head).weight = weight


class TypeEvaluator(KLEvaluator):
    """Measures genomes.

    Args:
        mixed: the model; evaluators may share it.
        tokens, reference, rows: see :class:`halfbyte.search.evaluator.KLEvaluator`.
        head: the weight ``[vocab, hidden]`` that the reference was made with; by default the model's unquantised one,
            which another transform may have rotated.
    """

    def __init__(
        self,
        mixed: MixedTypes,
        tokens: torch.Tensor,
        reference: Reference,
        *,
        rows: int | None = None,
        head: torch.Tensor | None = None,
    ) -> None:
        mixed.load(mixed.original)
        super().__init__(mixed.model, mixed.family, [], tokens, reference, rows=rows)
        self.mixed, self._tokens = mixed, tokens
        self._first = {ORIGINAL: self._embedded}  # gene of the embedding -> first hidden states
        own = mixed.unquantised(mixed.head)
        self._answered = StoredMatrix(own if head is None else head, self.device)
        same = self._answered.original is own
        self._references = {ORIGINAL: reference} if same else {}  # gene of the head -> what is known for its weight

    def each_alone(self, genes: Sequence[int]) -> Iterator[tuple[int, float]]:
        """(place, KL) for each matrix with its gene from ``genes`` and all others as they were, in any order.

        Up to its own block each such model is the original, so only the blocks from there on are run. Some of them go
        through the blocks side by side, so that an unquantised block is needed on the device only now and then.
        """
        depth, matrices = len(blocks(self.model, self.family)), self.mixed.matrices
        starts = {at: max(0, matrix.block) for at, matrix in enumerate(matrices)}
        if self.mixed.head != self.mixed.embedding:
            starts[self.mixed.head] = depth
        order = sorted(starts, key=starts.__getitem__)
        position, base = 0, self._embedded
        for part in (order[at : at + SIDE_BY_SIDE] for at in range(0, len(order), SIDE_BY_SIDE)):
            changed = {at: self._with(at, genes[at]) for at in part}
            base = self._side_by_side({changed[at]: at for at in part}, starts, position, base)
            position = starts[part[-1]]
            for at, genome in changed.items():
                yield at, self.score(genome)

    def _with(self, at: int, gene: int) -> Genome:
        """The original but for one matrix."""
        return (*self.mixed.original[:at], gene, *self.mixed.original[at + 1 :])

    def _side_by_side(
        self, places: Mapping[Genome, int], starts: Mapping[int, int], position: int, base: torch.Tensor
    ) -> torch.Tensor:
        """Measure genomes that differ from the original in one place each.

        Args:
            places: genome -> that place, by rising start.
            starts: place -> its block.
            position, base: hidden states of the original before that block, ``[windows, length, hidden]``.

        Returns:
            hidden states of the original before the last of the genomes' blocks.
        """
        layers, last = blocks(self.model, self.family), starts[list(places.values())[-1]]
        rows = [Row(genome, window) for genome in places for window in range(self.windows)]
        batches = self._batches([row for row in rows if row not in self._known])
        own = [(batch, places[batch[0].genome], self._windows_of(batch)) for batch in processes().share(batches)]
        states: dict[int, torch.Tensor] = {}  # number of a batch -> its hidden states
        for index in range(position, len(layers)):
            with self.mixed.held(index):
                for number, (batch, at, windows) in enumerate(own):
                    if starts[at] > index:
                        continue
                    if starts[at] == index:
                        first = self._hidden(batch[0].genome) if at == self.mixed.embedding else base
                        states[number] = first[windows]
                        self.mixed.load(batch[0].genome)
                    states[number] = call_block(layers[index], states[number], self._kwargs)
                    self.mixed.load(self.mixed.original)
                if index < last:
                    base = self._advance(layers[index], base, self.mixed.original)
        found = []
        for number, (batch, at, windows) in enumerate(own):
            self.mixed.put(self.mixed.head, batch[0].genome[self.mixed.head])
            found.append(self._at_the_end(batch, windows, states.pop(number) if number in states else base[windows]))
            self.mixed.load(self.mixed.original)
            self._count(batch, starts[at])
        self._learn(batches, found)
        return base

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of one genome at a time."""
        by_genome: dict[Genome, list[Row]] = {}
        for row in rows:
            by_genome.setdefault(row.genome, []).append(row)
        return [batch for own in by_genome.values() for batch in super(TypeEvaluator, self)._batches(own)]

    def _set(self, batch: Sequence[Row]) -> torch.Tensor:
        self.mixed.load(batch[0].genome)
        return self._windows_of(batch)

    def _kl(self, batch: Sequence[Row], hidden: torch.Tensor, start: int) -> torch.Tensor:
        return super()._kl(batch, self._hidden(batch[0].genome) if start == 0 else hidden, start)

    def _read_by_head(self, final: torch.Tensor, genome: Genome) -> torch.Tensor:
        return rounded_inputs(final, self.mixed.input_block(self.mixed.head, genome[self.mixed.head]))

    def _reference(self, genome: Genome) -> Reference:
        gene = genome[self.mixed.head]
        if gene not in self._references:
            if not self.mixed.packed:
                self._answered.hold_(on_device=True)
            self._references[gene] = self.reference.for_head(self._answered, self.head.weight)
            self._answered.hold_(on_device=False)
        return self._references[gene]

    def _hidden(self, genome: Genome) -> torch.Tensor:
        """First hidden states with the embedding that ``genome`` has."""
        gene = genome[self.mixed.embedding]
        if gene not in self._first:
            if self.mixed.packed:  # the device is small, and looking up is quick
                self._first = {ORIGINAL: self._embedded}
            self.mixed.put(self.mixed.embedding, gene)
            inputs = capture(self.model, self.family, self._tokens, device=self.device, batch=self.rows)
            self._first[gene] = torch.cat(inputs.hidden)
        return self._first[gene]
