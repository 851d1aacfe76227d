"""R3: queries and keys rotated after the rotary embedding, at run time.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456). The scores q·k stay the same. It spreads outliers of the keys before a
cache is quantised; linear layers never see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from halfbyte.quant.hadamard import rotate

NAME = "halfbyte_rotated_sdpa"


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``query`` and ``key`` ``[batch, heads, length, head_dim]`` are turned by the same rotation."""
    turned = rotate(query).to(query.dtype), rotate(key).to(key.dtype)
    return sdpa_attention_forward(module, *turned, value, *args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def rotate_queries_and_keys_(model: nn.Module) -> None:
    """Let every attention of ``model`` turn its queries and keys, in place."""
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
