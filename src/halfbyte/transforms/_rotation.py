"""Rotations of the residual stream, of the attention heads and of a layer's input, folded into parameters.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024, arXiv:2405.16406).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from halfbyte.core.precision import products
from halfbyte.models.families import Family
from halfbyte.models.modules import linear
from halfbyte.quant.hadamard import largest_block, rotate
from halfbyte.transforms import UnitStep

Rotate = Callable[[torch.Tensor], torch.Tensor]  # [..., width] -> [..., width], orthogonal

CHUNK_ROWS = 16384  # of the embedding, in fp32 at once


def rotate_block_(block: nn.Module, family: Family, turn: Rotate = rotate) -> None:
    """Let one block read and write a rotated residual stream, in place; its norms become plain."""
    for norm, readers in family.norm_readers:
        scale = block.get_submodule(norm).weight
        assert isinstance(scale, torch.Tensor)
        for reader in readers:
            layer = linear(block, reader)
            _set_(layer.weight, turn(layer.weight.float() * scale.float()))
        _set_(scale, torch.ones_like(scale))
    for writer in (family.attention_out, family.down):
        layer = linear(block, writer)
        _set_(layer.weight, turn(layer.weight.float().T).T)
        if layer.bias is not None:
            _set_(layer.bias, turn(layer.bias.float()))


def rotate_ends_(model: nn.Module, family: Family, device: torch.device, turn: Rotate = rotate) -> None:
    """Rotate the embedding and the output head, a few rows at a time on ``device``.

    The embedding is written to; the head gets a tensor of its own, which also unties it.
    """
    embedding, head = model.get_submodule(family.embedding), linear(model, family.head)
    norm = model.get_submodule(family.final_norm).weight
    assert isinstance(norm, torch.Tensor)
    assert isinstance(embedding.weight, torch.Tensor)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for rows in embedding.weight.split(CHUNK_ROWS):
        _set_(rows, turn(rows.to(device).float()))
    for rows in head.weight.split(CHUNK_ROWS):
        _set_(rows, turn(rows.to(device).float() * norm.to(device).float()))
    _set_(norm, torch.ones_like(norm))


@products(exact=True)
def transform_heads_(
    block: nn.Module, family: Family, forward: torch.Tensor, backward: torch.Tensor, head_dim: int
) -> None:
    """v → T v per key/value head, o → o T⁻¹ for every query head that shares it, in place (R2 when T is a rotation).

    Args:
        forward, backward: T and T⁻¹, fp32 ``[value_heads, head_dim, head_dim]``.
    """
    value, out = linear(block, family.value), linear(block, family.attention_out)
    heads = value.weight.shape[0] // head_dim
    rows = value.weight.float().view(heads, head_dim, -1)
    _set_(value.weight, (forward @ rows).flatten(0, 1))
    if value.bias is not None:
        _set_(value.bias, (forward @ value.bias.float().view(heads, head_dim, 1)).flatten())
    columns = out.weight.float().view(out.weight.shape[0], heads, -1, head_dim)  # [out, heads, group, head_dim]
    _set_(out.weight, torch.einsum("ohgd,hde->ohge", columns, backward).reshape(out.weight.shape))


def rotate_input_(unit: UnitStep) -> None:
    """Let the unit's input be rotated at run time; in blocks where the recipe says so."""
    width = linear(unit.step.original, unit.group[0]).weight.shape[1]
    if unit.group[0] in (unit.family.attention_out, unit.family.down):  # whose inputs several GPUs share
        width //= unit.recipe.tensor_parallel
    block = min(largest_block(width), unit.recipe.rotation_block)
    unit.scheme = replace(unit.scheme, rotated=True, block=block)


def _set_(target: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)
