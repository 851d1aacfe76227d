"""Walk the original and its quantised copy side by side, one block at a time on the device.

The original block always sees the unquantised model's hidden states; the copy sees what the quantised blocks before it
made of them. Statistics of a layer's input are therefore those that it will meet (Frantar et al. 2022, GPTQ,
arXiv:2210.17323, section 4; with both inputs: Li et al. 2025, GPTAQ, arXiv:2504.02692).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.calibration.blocks import call_block, capture
from halfbyte.models.archs import Family
from halfbyte.models.modules import blocks


class _Seen(Exception):
    """Stops a forward pass where it has shown what was wanted."""


class TwinStep:
    """One stop of :func:`walk_twins`, used in this order: change ``original``, ``observe``, ``split``, replace linears.

    Attributes:
        index: of the block.
        original: unquantised, fp32, on the device.
        quantised: after :meth:`split`, its copy, whose linears are to be replaced one group after the other.
        seen: after :meth:`observe`, first linear of a group -> per batch its input in the original ``[tokens, in]``.
    """

    def __init__(
        self, index: int, block: nn.Module, hidden: list[tuple[torch.Tensor, torch.Tensor]], kwargs: dict[str, Any]
    ) -> None:
        self.index, self.original, self.quantised = index, block, block
        self.seen: dict[str, list[torch.Tensor]] = {}
        self._hidden, self._kwargs = hidden, kwargs
        self._outputs: list[torch.Tensor] = []

    def observe(self, parts: Sequence[str]) -> None:
        """Run the original once and keep what the linears at ``parts`` are given, and the block's output."""
        handles = []
        for part in parts:
            kept = self.seen.setdefault(part, [])

            def keep(_: nn.Module, args: tuple[torch.Tensor, ...], kept: list[torch.Tensor] = kept) -> None:
                kept.append(args[0].flatten(0, -2))

            handles.append(self.original.get_submodule(part).register_forward_pre_hook(keep))
        try:
            self._outputs = [call_block(self.original, hidden, self._kwargs) for hidden, _ in self._hidden]
        finally:
            for handle in handles:
                handle.remove()

    def split(self) -> None:
        """Start the copy from the original as it is now."""
        self.quantised = copy.deepcopy(self.original)

    def inputs(self, part: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per batch: what the linear at ``part`` is given in the original and in the copy, ``[tokens, in]`` each."""
        for known, (_, hidden) in zip(self.seen[part], self._hidden, strict=True):
            yield known, self._input_of_copy(part, hidden)

    def _input_of_copy(self, part: str, hidden: torch.Tensor) -> torch.Tensor:
        """Run the copy up to the linear at ``part``, and no further."""
        found: list[torch.Tensor] = []

        def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0].flatten(0, -2))
            raise _Seen

        handle = self.quantised.get_submodule(part).register_forward_pre_hook(stop)
        try:
            call_block(self.quantised, hidden, self._kwargs)
        except _Seen:
            pass
        finally:
            handle.remove()
        return found[0]

    def advance(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the next block is called with."""
        copies = (call_block(self.quantised, hidden, self._kwargs) for _, hidden in self._hidden)
        return list(zip(self._outputs, copies, strict=True))


def walk_twins(
    model: nn.Module, family: Family, tokens: torch.Tensor, *, device: torch.device, batch: int = 1
) -> Iterator[TwinStep]:
    """Yield a :class:`TwinStep` per block; afterwards the model holds the quantised copy where the block was.

    Args:
        tokens: ``[windows, length]``, ``batch`` windows at a time.
    """
    inputs = capture(model, family, tokens, device=device, batch=batch)
    hidden = [(part.float(), part.float()) for part in inputs.hidden]
    kwargs = {key: _as_fp32(value) for key, value in inputs.kwargs.items()}
    del inputs
    holder = model.get_submodule(family.blocks)
    for index, block in enumerate(blocks(model, family)):
        home = next(block.parameters())
        step = TwinStep(index, copy.deepcopy(block).to(device=device, dtype=torch.float32), hidden, kwargs)
        yield step
        hidden = step.advance()
        setattr(holder, str(index), step.quantised.to(device=home.device, dtype=home.dtype))


def _as_fp32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return tuple(_as_fp32(item) for item in value) if isinstance(value, tuple) else value
