"""Sequential calibration: the original and its quantised copy side by side, one block at a time on the device.

The original block always sees the unquantised model's hidden states; the copy sees what the quantised blocks before it
made of them. Statistics of a layer's input are therefore those that it will meet (Frantar et al. 2022, GPTQ,
arXiv:2210.17323, section 4; with both inputs: Li et al. 2025, GPTAQ, arXiv:2504.02692).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.core.distributed import ALONE, Group
from halfbyte.models.families import Family
from halfbyte.models.modules import blocks


class _Seen(Exception):
    """Stops a forward pass where it has shown what was wanted."""


class _Replay(nn.Module):
    """Stands where a block's attention is, and returns what that returned before."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:  # [windows, length, hidden]
        """What Hugging Face's attention modules return: output and, not asked for, weights."""
        return self.output, None


class BlockStep:
    """One stop of :func:`walk_blocks`; in this order: change ``original``, ``observe``, ``split``, replace linears.

    A linear is replaced between the call of :meth:`inputs` for it (or for another that shares its input) and the next
    call. Attention runs once in the copy if the linears are taken in their order: what it gives to its last linear is
    kept.

    Attributes:
        index: of the block.
        original: unquantised, fp32, on the device.
        quantised: after :meth:`split`, its copy, whose linears are to be replaced one group after the other.
        seen: after :meth:`observe`, first linear of a group -> per batch its input in the original ``[tokens, in]``.
        outputs: after :meth:`observe`, per batch the original's output ``[windows, length, hidden]``.
        group: processes that walk over the same blocks, each with its share of the batches.
    """

    def __init__(
        self,
        index: int,
        block: nn.Module,
        hidden: list[tuple[torch.Tensor, torch.Tensor]],
        kwargs: dict[str, Any],
        attention_out: str,
        group: Group = ALONE,
    ) -> None:
        self.group = group
        self.index, self.original, self.quantised = index, block, block
        self.seen: dict[str, list[torch.Tensor]] = {}
        self._hidden, self._kwargs = hidden, kwargs
        self._device, self._home = next(block.parameters()).device, hidden[0][0].device
        self.outputs: list[torch.Tensor] = []
        self._attention_out = attention_out
        self._attention = attention_out.rpartition(".")[0]
        self._mixed: list[torch.Tensor] = []  # per batch the input of the copy's attention_out, until that is replaced
        self._attended: list[torch.Tensor] = []  # then its output

    def observe(self, parts: Sequence[str]) -> None:
        """Run the original once and keep what the linears at ``parts`` are given, and the block's output.

        All of it is kept where the hidden states are.
        """
        handles = []
        for part in parts:
            kept = self.seen.setdefault(part, [])

            def keep(_: nn.Module, args: tuple[torch.Tensor, ...], kept: list[torch.Tensor] = kept) -> None:
                kept.append(args[0].flatten(0, -2).to(self._home))

            handles.append(self.original.get_submodule(part).register_forward_pre_hook(keep))
        try:
            self.outputs = [
                call_block(self.original, hidden.to(self._device), self._kwargs).to(self._home)
                for hidden, _ in self._hidden
            ]
        finally:
            for handle in handles:
                handle.remove()

    def split(self) -> None:
        """Start the copy from the original as it is now."""
        self.quantised = copy.deepcopy(self.original)

    def inputs(
        self, part: str, counts: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Per batch: what the linear at ``part`` is given in the original and in the copy, ``[tokens, in]`` each.

        Both are on the device. The third is what each token counts, ``[tokens]`` of ``counts`` ``[windows, length]``.
        """
        sizes = [len(original) for original in self.seen[part]]
        weights = [None] * len(sizes) if counts is None else counts.flatten().split(sizes)
        if part.startswith(self._attention + "."):  # and will be replaced
            self._mixed, self._attended = [], []
        mixed = []
        for index, original in enumerate(self.seen[part]):
            of_copy = self._input_of_copy(part, index)
            if part == self._attention_out:
                mixed.append(of_copy.to(self._home))
            yield original.to(self._device), of_copy, weights[index]
        self._mixed += mixed

    def _input_of_copy(self, part: str, index: int) -> torch.Tensor:
        """Run the copy on one batch up to the linear at ``part``, and no further."""
        found: list[torch.Tensor] = []

        def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0].flatten(0, -2))
            raise _Seen

        handle = self.quantised.get_submodule(part).register_forward_pre_hook(stop)
        try:
            with suppress(_Seen):
                self._run_copy(index)
        finally:
            handle.remove()
        return found[0]

    def _run_copy(self, index: int) -> torch.Tensor:
        """The copy's output for one batch, ``[windows, length, hidden]``; attention as it is remembered, or anew."""
        hidden = self._hidden[index][1].to(self._device)
        while self._mixed:
            with torch.no_grad():
                output = self.quantised.get_submodule(self._attention_out)(self._mixed.pop(0).to(self._device))
            self._attended.append(output.view_as(self._hidden[len(self._attended)][1]).to(self._home))
        if not self._attended:
            return call_block(self.quantised, hidden, self._kwargs)
        attention = self.quantised.get_submodule(self._attention)
        self.quantised.set_submodule(self._attention, _Replay(self._attended[index].to(self._device)))
        try:
            return call_block(self.quantised, hidden, self._kwargs)
        finally:
            self.quantised.set_submodule(self._attention, attention)

    def advance(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the next block is called with; without a copy, the same twice."""
        if self.quantised is self.original:  # never split: nothing was quantised
            return list(zip(self.outputs, self.outputs, strict=True))
        copies = [self._run_copy(index).to(self._home) for index in range(len(self._hidden))]
        self._mixed, self._attended = [], []
        return list(zip(self.outputs, copies, strict=True))


def walk_blocks(
    model: nn.Module,
    family: Family,
    tokens: torch.Tensor,
    *,
    device: torch.device,
    batch: int = 1,
    leave: Callable[[BlockStep], None] | None = None,
    keep_on: torch.device | None = None,
    copies: Sequence[torch.Tensor] | None = None,
    group: Group = ALONE,
) -> Iterator[BlockStep]:
    """Yield a :class:`BlockStep` per block; afterwards the model holds the quantised copy where the block was.

    The block itself is never written to: its parameters may be mapped from a file.

    Args:
        tokens: ``[windows, length]``, ``batch`` windows at a time.
        leave: called with every step when the next block's inputs are known, before its copy goes to where the block
            was.
        keep_on: where hidden states and what is seen of inputs are kept, by default the device: main memory beside a
            device that is too small for them.
        copies: what the first block's copy is called with, one ``[windows, length, hidden]`` per batch; by default what
            the block itself is.
        group: see :class:`BlockStep`; ``tokens`` are this process's share.
    """
    inputs = capture(model, family, tokens, device=device, batch=batch)
    kept = [part.to(keep_on or device).float() for part in inputs.hidden]
    copied = kept if copies is None else [part.to(keep_on or device).float() for part in copies]
    hidden = list(zip(kept, copied, strict=True))
    kwargs = {key: _as_fp32(value) for key, value in inputs.kwargs.items()}
    del inputs, kept, copied
    holder = model.get_submodule(family.blocks)
    for index in range(len(blocks(model, family))):
        block = blocks(model, family)[index]
        first = next(block.parameters())
        home, dtype = first.device, first.dtype
        step = BlockStep(index, block_copy(block, device, torch.float32), hidden, kwargs, family.attention_out, group)
        del block, first  # nothing but the model holds them, so that its memory is free when the copy takes its place
        yield step
        hidden = step.advance()
        if leave is not None:
            leave(step)
        setattr(holder, str(index), step.quantised.to(dtype).to(home))  # converted where it is, then moved


def sample(batches: Sequence[torch.Tensor], tokens: int, device: torch.device, group: Group = ALONE) -> torch.Tensor:
    """At most ``tokens`` rows, evenly spaced over all batches of ``[tokens, in]``, on ``device``.

    Args:
        group: each of whose processes has a share of the batches; all get the same rows.
    """
    stride = max(1, sum(group.merge([len(batch) for batch in batches])) // tokens)
    return torch.cat(group.merge_rows([batch[::stride].to(device) for batch in batches]))[:tokens]


def _as_fp32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return tuple(_as_fp32(item) for item in value) if isinstance(value, tuple) else value


@dataclass
class BlockInputs:
    """What the first block is called with.

    Attributes:
        hidden: one ``[windows, length, hidden]`` tensor per batch.
        kwargs: rotary embeddings, mask and the like; the same for every batch and block.
    """

    hidden: list[torch.Tensor]
    kwargs: dict[str, Any]


def capture(
    model: nn.Module, family: Family, tokens: torch.Tensor, *, device: torch.device, batch: int = 1
) -> BlockInputs:
    """Run embeddings only, on ``tokens`` ``[windows, length]``, ``batch`` windows at a time."""
    first = blocks(model, family)[0]
    hidden: list[torch.Tensor] = []
    kwargs: dict[str, Any] = {}

    def stop(_: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        hidden.append(args[0] if args else named.pop("hidden_states"))
        kwargs.update(named)
        raise _Seen

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for part in tokens.split(batch):
            with torch.no_grad(), suppress(_Seen):
                model(input_ids=part.to(next(model.parameters()).device), use_cache=False)
    finally:
        handle.remove()
    moved = {key: _to(value, device) for key, value in kwargs.items()}
    return BlockInputs([part.to(device) for part in hidden], moved)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value


def call_block(block: nn.Module, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """One block's output hidden states ``[windows, length, hidden]``."""
    with torch.no_grad():
        output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def block_copy(block: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy on ``device``; parameters go there one by one, and are converted there.

    So there is no second copy of the block on the way, and no more is moved than is stored.
    """
    made: dict[int, Any] = {
        id(own): nn.Parameter(own.detach().to(device).to(dtype or own.dtype, copy=True), requires_grad=False)
        for own in block.parameters()
    }
    return copy.deepcopy(block, made).to(device=device, dtype=dtype)


def run_blocks(model: nn.Module, family: Family, tokens: torch.Tensor, *, device: torch.device) -> list[torch.Tensor]:
    """Hidden states after the last block, ``[windows, length, hidden]`` per window; blocks visit ``device`` in turn."""
    inputs = capture(model, family, tokens, device=device)
    hidden = inputs.hidden
    for block in blocks(model, family):
        if next(block.parameters()).device != device:
            block = block_copy(block, device)
        hidden = [call_block(block, states, inputs.kwargs) for states in hidden]
    return hidden
