"""The parts of a model by their paths, and channel scales moved between them, chosen or random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig

from halfbyte.models.families import Family

SPREAD = 0.1  # standard deviation of the factors' logarithm


def linear(parent: nn.Module, path: str) -> nn.Linear:
    """The linear layer at ``path``: an ``nn.Linear``, or a ``QuantLinear``, which has the same attributes."""
    return cast(nn.Linear, parent.get_submodule(path))


def blocks(model: nn.Module, family: Family) -> list[nn.Module]:
    """The transformer blocks, in order."""
    return list(model.get_submodule(family.blocks).children())


def vocabulary(model: nn.Module, family: Family) -> int:
    """Rows of the output head."""
    return linear(model, family.head).weight.shape[0]


def head_dim(config: PretrainedConfig) -> int:
    """Features of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def is_tied(model: nn.Module, family: Family) -> bool:
    """Whether the output head is the embedding."""
    return linear(model, family.head).weight is model.get_submodule(family.embedding).weight


def move_(model: nn.Module, family: Family, device: torch.device, *, without_embedding: bool = False) -> None:
    """Move the model to ``device``; ``without_embedding`` leaves an embedding that is not the head too where it is."""
    if not without_embedding or is_tied(model, family):
        model.to(device)
        return
    for part in (family.blocks, family.final_norm, family.head):
        model.get_submodule(part).to(device)


def fold_scales_(
    block: nn.Module, family: Family, group: Sequence[str], scales: torch.Tensor, *, head_dim: int
) -> None:
    """Divide the common input of the linears in ``group`` by ``scales`` ``[in]``, in the parameters of ``block``.

    For o_proj the scales must be the same for all query heads that share a value head.
    """
    norms = {readers: norm for norm, readers in family.norm_readers}
    group = tuple(group)
    if group in norms:
        _divide_(block.get_submodule(norms[group]), scales)
    elif group == (family.attention_out,):
        value = linear(block, family.value)
        heads = value.weight.shape[0] // head_dim
        _divide_(value, scales.view(heads, -1, head_dim)[:, 0].flatten())
    else:
        _divide_(linear(block, family.up), scales)
    for part in group:
        weight = linear(block, part).weight
        with torch.no_grad():
            weight.copy_(weight.float() * scales)


def _divide_(module: nn.Module, scales: torch.Tensor) -> None:
    """Divide the outputs of a norm or linear layer by ``scales`` ``[out]``, in its parameters."""
    for parameter in module.parameters(recurse=False):
        divisor = scales.view(-1, *([1] * (parameter.dim() - 1)))
        with torch.no_grad():
            parameter.copy_(parameter.float() / divisor)


def rescale_(model: nn.Module, family: Family, rng: torch.Generator, spread: float = SPREAD) -> None:
    """Multiply input channels by random factors and divide what makes them, in the parameters of ``model``.

    The same function with other weights, for a checkpoint whose weights were quantised once (the demo's were Q4_1): it
    flatters every format with the same grid. Every input channel of every linear layer in the blocks gets a random
    factor, exp(N(0, spread²)), and what makes that input is divided by it: the norm before q, k, v and before gate and
    up, the rows of v before o (one factor for the query heads that share a value head), the rows of up before down. A
    head of its own is treated like q, k, v; a tied one, and the embedding, stay as they are, for no factor there
    cancels. q and k keep their outputs: only one factor per rotary pair would cancel.

    A spread of 0.1 takes the demo off its grid: plain Q4_1 then makes 0.82 of Q4_0's weighted error, as with more, and
    0 with none. More spread only makes the model harder to round, and favours whatever can fold scales back.

    Args:
        model: in fp32 on the host, so that the function is kept to rounding.
        rng: what the factors are drawn from, block by block.
        spread: standard deviation of their logarithm.
    """
    width = head_dim(model.config)  # pyright: ignore[reportArgumentType]
    for block in blocks(model, family):
        for group in family.groups:
            features = linear(block, group[0]).in_features
            if group == (family.attention_out,):
                value_heads = linear(block, family.value).out_features // width
                scales = _factors(value_heads * width, rng, spread).view(value_heads, 1, width)
                scales = scales.expand(-1, features // (value_heads * width), -1).flatten()  # as o reads its heads
            else:
                scales = _factors(features, rng, spread)
            fold_scales_(block, family, group, scales, head_dim=width)
    if not is_tied(model, family):
        norm, head = model.get_submodule(family.final_norm), linear(model, family.head)
        scales = _factors(head.in_features, rng, spread)
        _divide_(norm, scales)
        with torch.no_grad():
            head.weight.mul_(scales)


def _factors(count: int, rng: torch.Generator, spread: float) -> torch.Tensor:
    return (torch.randn(count, generator=rng) * spread).exp()
