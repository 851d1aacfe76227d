"""Walk a model block by block, holding one block and its activations on the device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.models.families import Family
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

    def stop(_: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        hidden.append(args[0] if args else named.pop("hidden_states"))
        kwargs.update(named)
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


def block_copy(block: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy on ``device``; parameters go there one by one, and are converted there.

    So there is no second copy of the block on the way, and no more is moved than is stored.
    """
    made: dict[int, Any] = {
        id(own): nn.Parameter(own.detach().to(device).to(dtype or own.dtype, copy=True), requires_grad=False)
        for own in block.parameters()
    }
    return copy.deepcopy(block, made).to(device=device, dtype=dtype)


def run_blocks(
    model: nn.Module, family: Family, tokens: torch.Tensor, *, device: torch.device, batch: int = 1
) -> list[torch.Tensor]:
    """Hidden states after the last block, ``[windows, length, hidden]`` per batch; blocks visit ``device`` in turn."""
    inputs = capture(model, family, tokens, device=device, batch=batch)
    hidden = inputs.hidden
    for block in blocks(model, family):
        if next(block.parameters()).device != device:
            block = block_copy(block, device)
        hidden = [call_block(block, states, inputs.kwargs) for states in hidden]
    return hidden
