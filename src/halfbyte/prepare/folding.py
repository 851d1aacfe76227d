"""Fold a recipe's transforms into a model: outside the blocks before a walk, then block by block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from halfbyte.calibration.walk import BlockStep
from halfbyte.models.families import Family
from halfbyte.models.loading import SourceModel, stored_dtype
from halfbyte.models.modules import head_dim, linear
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.int4 import fitting_group_size
from halfbyte.quant.quant_linear import InputScheme
from halfbyte.transforms import UnitStep
from halfbyte.transforms._rotation import CHUNK_ROWS


@dataclass
class Folded:
    """What :func:`fold_block_` leaves of a block, beside the block itself and what was seen of its inputs.

    Attributes:
        schemes: linears of a unit -> what happens to their input at run time.
        scales: first linear of a unit -> which channel scales were chosen.
        channel_scales: the same -> those scales, fp32 ``[in]``.
        input_power: linear -> what folding did to the mean square of each of its input channels, ``[in]``; without
            those whose channels a rotation mixed.
    """

    schemes: dict[tuple[str, ...], InputScheme] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)
    channel_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    input_power: dict[str, torch.Tensor] = field(default_factory=dict)


def fold_ends_(source: SourceModel, recipe: Recipe, device: torch.device) -> None:
    """Rewrite what is outside the blocks, in place; the tensor of the output head is not written to."""
    for transform in recipe.applied:
        transform.change_ends_(source.model, source.family, device)
    if recipe.ends_as_stored:
        _round_(source.model, changed_ends(source.family, recipe), stored_dtype(source.origin))


def changed_ends(family: Family, recipe: Recipe) -> tuple[str, ...]:
    """Modules outside the blocks whose parameters :func:`fold_ends_` rewrites."""
    return tuple(dict.fromkeys(part for transform in recipe.applied for part in transform.outside_blocks(family)))


def mixed_inputs(family: Family, recipe: Recipe) -> tuple[str, ...]:
    """Linear layers, by their path in a block (or the head), whose input channels a folded transform mixes."""
    return tuple(dict.fromkeys(part for transform in recipe.applied for part in transform.mixes(family)))


def fold_block_(step: BlockStep, source: SourceModel, recipe: Recipe) -> Folded:
    """Fold every transform into the original block and see its inputs, as the transformed block has them.

    Raises:
        HalfbyteError: activations are not finite.
    """
    family, size = source.family, head_dim(source.config)
    applied, mixed = recipe.applied, mixed_inputs(source.family, recipe)
    for transform in applied:
        transform.fold_block_(step.original, family, size)
    step.observe([group[0] for group in family.groups])
    folded = Folded()
    for group in family.groups:
        width = linear(step.original, group[0]).weight.shape[1]
        share = fitting_group_size(width, recipe.group_size) if recipe.input_groups else 0
        scheme = InputScheme(symmetric=recipe.symmetric, arithmetic=recipe.arithmetic, group=share)
        unit = UnitStep(step, group, family, size, recipe, scheme)
        before = _power(step, group)
        for transform in applied:
            transform.treat_input_(unit)
        for transform in applied:
            transform.fold_unit_(unit)
        folded.schemes[group] = unit.scheme
        if unit.scales:
            folded.scales[group[0]] = unit.scales
        if unit.channel_scales is not None:
            folded.channel_scales[group[0]] = unit.channel_scales.cpu()
        ratio = torch.where(before > 0, _power(step, group) / before, torch.ones_like(before))
        folded.input_power |= {part: ratio for part in group if part not in mixed}
    return folded


def _power(step: BlockStep, group: tuple[str, ...]) -> torch.Tensor:
    """Sum of squares of the group's input channels in the first batch, ``[in]``."""
    return step.seen[group[0]][0].square().sum(0)


def _round_(model: nn.Module, parts: tuple[str, ...], dtype: torch.dtype) -> None:
    """Round the parameters of modules to ``dtype``, in place and in their own, a few rows at a time."""
    for part in parts:
        for parameter in model.get_submodule(part).parameters():
            for rows in parameter.detach().split(CHUNK_ROWS):
                with torch.no_grad():
                    rows.copy_(rows.to(dtype))
