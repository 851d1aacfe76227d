"""Typed access to the parts of a model by their paths."""

from __future__ import annotations

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
