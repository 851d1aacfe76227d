"""How much each token counts where codes are chosen: by the gradient of the loss at a layer's output.

GPTQ minimises the squared error of a layer's output, summed over tokens; what an error does to the model's answers
differs between tokens. To second order it is the error squared times the squared gradient of −log p(y), y drawn from
the model's own answers (the Fisher information; GuidedQuant, Kim et al. 2025, arXiv:2505.07004, weights Hessians with
it). Few tokens have most of it, so its root is taken: with all of it, what is fitted is what those few tokens say.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.calibration.walk import block_copy, call_block, capture
from halfbyte.core.distributed import ALONE, Group
from halfbyte.core.environment import available_memory
from halfbyte.core.precision import products
from halfbyte.core.progress import report
from halfbyte.models.estimate import windows_at_once
from halfbyte.models.families import Family
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import blocks, linear
from halfbyte.search.reference import token_chunks

STAGE = "token weights"
POWER = 0.5  # of the squared gradient
STATES_SHARE = 0.5  # of the device's free memory that hidden states may take


def token_weights(
    source: SourceModel, tokens: torch.Tensor, *, device: torch.device, seed: int = 0, group: Group = ALONE
) -> dict[str, torch.Tensor]:
    """First layer of a unit -> weight of every token, fp32 ``[windows, length]``, 1 on average, in main memory.

    Blocks visit ``device`` one at a time, forwards and then backwards; between that all hidden states stay there, or in
    main memory where they would fill the device.

    Args:
        source: the unquantised model; it stays as it is.
        tokens: calibration text, int64 ``[windows, length]``.
        seed: of the words that are drawn.
        group: processes that each have their share of the batches.
    """
    model, family = source.model, source.family
    inputs = capture(model, family, tokens, device=device, batch=windows_at_once(device, tokens.shape[1]))
    layers = blocks(model, family)
    size = sum(part.nbytes for part in inputs.hidden) * (len(layers) + 1)
    home = device if size < STATES_SHARE * available_memory(device) else torch.device("cpu")
    states = [[part.to(home) for part in inputs.hidden]]
    for index, layer in enumerate(layers):
        block = block_copy(layer, device)
        states.append([call_block(block, part.to(device), inputs.kwargs).to(home) for part in states[-1]])
        report(STAGE, index, 2 * len(layers), f"block {index}")
    generator = torch.Generator().manual_seed(seed)
    sizes = group.merge([part.shape[:2].numel() for part in inputs.hidden])
    chances = group.share([torch.rand(size, 1, generator=generator) for size in sizes])
    norm = copy.deepcopy(model.get_submodule(family.final_norm)).to(device)
    head = linear(model, family.head).weight.detach().to(device)
    ends = zip(states.pop(), chances, strict=True)
    gradients = [_of_answers(norm, head, part.to(device), chance).to(home) for part, chance in ends]
    del norm, head
    found: dict[str, torch.Tensor] = {}
    for index, layer in reversed(list(enumerate(layers))):
        block, powers = block_copy(layer, device), []
        for at, hidden in enumerate(states.pop()):
            before, power = _through(block, family, hidden.to(device), gradients[at].to(device), inputs.kwargs)
            gradients[at] = before.to(home)
            powers.append(power)
        for first in powers[0]:
            found[f"{family.blocks}.{index}.{first}"] = _weights([power[first] for power in powers], group)
        report(STAGE, 2 * len(layers) - index, 2 * len(layers), f"block {index}")
    return found


def _weights(powers: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
    weights = torch.cat(tuple(powers)).pow(POWER)
    mean = torch.cat(group.merge_rows(powers)).pow(POWER).mean()
    return (weights / mean).cpu() if float(mean) > 0 else torch.ones_like(weights).cpu()


@products(exact=True)
def _of_answers(norm: nn.Module, head: torch.Tensor, hidden: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """The gradient of −log p(y) at the last block's output ``[windows, length, hidden]``, y drawn for each token.

    Args:
        chances: uniform in [0, 1), ``[tokens, 1]``.
    """
    found = []
    parts = token_chunks(hidden.flatten(0, 1))
    for part, chance in zip(parts, chances.split(len(parts[0])), strict=True):
        states = part.detach().requires_grad_(True)
        with torch.enable_grad():
            log_p = nn.functional.linear(norm(states), head).float().log_softmax(-1)  # [tokens, vocab]
            drawn = torch.searchsorted(log_p.detach().exp().cumsum(-1), chance.to(log_p.device))
            drawn = drawn.clamp_max(log_p.shape[-1] - 1)
            log_p.gather(-1, drawn).sum().neg().backward()
        assert states.grad is not None
        found.append(states.grad)
    return torch.cat(found).view_as(hidden)


def _through(
    block: nn.Module, family: Family, hidden: torch.Tensor, gradient: torch.Tensor, kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gradient at a block's input, and of each unit the squared gradient at its outputs ``[windows, length]``."""
    power = {group[0]: hidden.new_zeros(hidden.shape[:2], dtype=torch.float32) for group in family.groups}
    handles = []
    for group in family.groups:
        for part in group:

            def see(_: nn.Module, __: tuple, output: torch.Tensor, sums: torch.Tensor = power[group[0]]) -> None:
                def add(own: torch.Tensor) -> None:
                    sums.add_(own.float().square().sum(-1))

                output.register_hook(add)

            handles.append(block.get_submodule(part).register_forward_hook(see))
    hidden = hidden.detach().requires_grad_(True)
    try:
        with torch.enable_grad():
            output = block(hidden, **kwargs)
            (output[0] if isinstance(output, tuple) else output).backward(gradient)
    finally:
        for handle in handles:
            handle.remove()
    assert hidden.grad is not None
    return hidden.grad, power
