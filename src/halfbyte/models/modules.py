"""The parts of a model by their paths, and channel scales moved between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig

from halfbyte.models.families import Family


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
