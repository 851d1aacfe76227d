"""What llama.cpp does to the inputs of a matrix before it multiplies: it rounds them to 8 bits, in blocks.

On CPUs the type of the matrix says how: those in blocks of 32 weights have inputs with a scale (fp16) for 32 values,
those in blocks of 256 with one (fp32) for 256. Source: ``vec_dot_type`` of ``ggml_get_type_traits_cpu``, and
``quantize_row_q8_0`` and ``quantize_row_q8_K`` (ggml-cpu.c, ggml-quants.c). Its CUDA code rounds all in blocks of 32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.quant.ggml.types import QUANTISED, SMALL_BLOCK, block_size

LEVELS = 127
ROWS = 8192  # of a matrix, squared at once


def input_block(type_name: str) -> int:
    """How many inputs share a scale; 0 for types whose inputs are not rounded to integers."""
    return block_size(type_name) if type_name in QUANTISED else 0


def rounded_inputs(x: torch.Tensor, block: int) -> torch.Tensor:
    """``x`` ``[..., in]`` as llama.cpp multiplies it, in the dtype of ``x``.

    Args:
        block: see :func:`input_block`; 0 changes nothing.
    """
    if not block:
        return x
    parts = x.float().unflatten(-1, (-1, block))
    step = parts.abs().amax(-1, keepdim=True) / LEVELS
    codes = (parts / torch.where(step == 0, 1.0, step)).round_()
    if block == SMALL_BLOCK:
        step = step.half().float()
    return (codes * step).flatten(-2).to(x.dtype)


def rounding_power(batches: Sequence[torch.Tensor], block: int, device: torch.device) -> torch.Tensor:
    """Mean square ``[in]`` of what rounding changes, over ``batches`` of ``[tokens, in]``, on ``device``."""
    total = torch.stack([(part - rounded_inputs(part, block)).square().sum(0) for part in batches]).sum(0)
    return (total / sum(len(part) for part in batches)).to(device)


def rounding_powers(
    batches: Sequence[torch.Tensor], kinds: Collection[str], device: torch.device
) -> dict[int, torch.Tensor]:
    """Input block -> :func:`rounding_power`, of all that the types ``kinds`` have."""
    sizes = {input_block(kind) for kind in kinds} - {0}
    return {size: rounding_power(batches, size, device) for size in sizes}


def error_of_rounding(weight: torch.Tensor, kind: str, powers: Mapping[int, torch.Tensor]) -> torch.Tensor | float:
    """Squared output error per token that rounding of inputs makes in ``weight`` ``[out, in]``, errors independent.

    Args:
        powers: from :func:`rounding_powers`, on the device where it is computed.
    """
    power = powers.get(input_block(kind))
    if power is None:
        return 0.0
    parts = weight.split(ROWS)
    return torch.stack([(part.to(power.device).float().square() @ power).sum() for part in parts]).sum()


class InputRounding:
    """Rounds the inputs of a linear layer from now on, once it is registered as a hook before its forward pass.

    Attributes:
        block: see :func:`rounded_inputs`.
    """

    def __init__(self, layer: nn.Module, type_name: str = "") -> None:
        self.block = input_block(type_name)
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded_inputs(args[0], self.block), *args[1:])
