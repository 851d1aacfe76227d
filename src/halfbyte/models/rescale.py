"""The same function with other weights: input channels of every layer get random factors that cancel.

A checkpoint whose weights were quantised once (the demo's were Q4_1) flatters every format with the same grid. Here
every input channel of every linear layer in the blocks gets a random factor, exp(N(0, spread²)), and what makes that
input is divided by it: the norm before q, k, v and before gate and up, the rows of v before o (one factor for the query
heads that share a value head), the rows of up before down. A head of its own is treated like q, k, v; a tied one, and
the embedding, stay as they are, for no factor there cancels. q and k keep their outputs: only one factor per rotary
pair would cancel.

A spread of 0.1 takes the demo off its grid: plain Q4_1 then makes 0.82 of Q4_0's weighted error, as with more, and 0
with none. More spread only makes the model harder to round, and favours whatever can fold scales back.
"""

from __future__ import annotations

import torch
from torch import nn

from halfbyte.models.families import Family
from halfbyte.models.modules import blocks, fold_scales_, head_dim, is_tied, linear

SPREAD = 0.1  # standard deviation of the factors' logarithm


def rescale_(model: nn.Module, family: Family, rng: torch.Generator, spread: float = SPREAD) -> None:
    """Multiply input channels by random factors and divide what makes them, in the parameters of ``model``.

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
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.div_(scales)
            head.weight.mul_(scales)


def _factors(count: int, rng: torch.Generator, spread: float) -> torch.Tensor:
    return (torch.randn(count, generator=rng) * spread).exp()
