"""Walk a model block by block, holding one block and its activations on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.models.archs import Family
from halfbyte.models.modules import blocks


class _Captured(Exception):
    """Raised inside the first block to stop the forward pass there."""


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

    def stop(_: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        hidden.append(args[0] if args else given.pop("hidden_states"))
        kwargs.update(given)
        raise _Captured

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for part in tokens.split(batch):
            with torch.no_grad(), suppress(_Captured):
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


@dataclass
class BlockStep:
    """One stop of :func:`walk_blocks`: look, run with hooks, then change the block if you like."""

    index: int
    block: nn.Module
    inputs: BlockInputs
    outputs: list[torch.Tensor] = field(default_factory=list)

    def forward(self, hooks: Mapping[str, Callable[[torch.Tensor], None]]) -> None:
        """Run every batch; ``hooks`` maps a linear's path in the block to what sees its input ``[tokens, in]``."""
        handles = []
        for part, see in hooks.items():

            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], see: Callable[[torch.Tensor], None] = see) -> None:
                see(args[0].flatten(0, -2))

            handles.append(self.block.get_submodule(part).register_forward_pre_hook(hook))
        try:
            self.outputs = [call_block(self.block, hidden, self.inputs.kwargs) for hidden in self.inputs.hidden]
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _resident(block: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


def walk_blocks(
    model: nn.Module, family: Family, tokens: torch.Tensor, *, device: torch.device, batch: int = 1
) -> Iterator[BlockStep]:
    """Yield a :class:`BlockStep` per block; the next block sees the outputs of the last ``step.forward``.

    The consumer must call ``step.forward`` before it changes the block.
    """
    inputs = capture(model, family, tokens, device=device, batch=batch)
    for index, block in enumerate(blocks(model, family)):
        with _resident(block, device):
            step = BlockStep(index, block, inputs)
            yield step
            inputs = BlockInputs(step.outputs, inputs.kwargs)
