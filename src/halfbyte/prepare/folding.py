"""Fold a recipe's transforms into a model: outside the blocks before a walk, then block by block.

A walk quantises what it folded, and of that only the codes stay. A file that stores some layers in more bits needs the
weights themselves: they are made again from the model and what the plan keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from halfbyte.calibration.walk import BlockStep, block_copy
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.families import Family
from halfbyte.models.loading import SourceModel, stored_dtype
from halfbyte.models.modules import blocks, fold_scales_, head_dim, linear
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.int4 import fitting_group_size
from halfbyte.quant.quant_linear import InputScheme
from halfbyte.transforms import TRANSFORMS, UnitStep
from halfbyte.transforms._rotation import CHUNK_ROWS

CPU = torch.device("cpu")


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


class TransformedBlocks:
    """Blocks with rotations and channel scales folded in, fp32 on the CPU, one in memory at a time.

    The model is read, never written to. What a plan rotates at run time (R4, ``online``) is not in the weights.

    Args:
        source: the unquantised model.
        recipe: with the plan's transforms and weight quantiser.
        channel_scales: as the plan's codes file has them.
        where: the plan, for errors.

    Raises:
        HalfbyteError: a transform that cannot be made again, or scales that the codes file lacks.
    """

    def __init__(
        self, source: SourceModel, recipe: Recipe, channel_scales: Mapping[str, torch.Tensor], *, where: object
    ) -> None:
        for name in recipe.transforms:
            if not TRANSFORMS[name].can_be_repeated:
                raise HalfbyteError(
                    f"{where}: the transform {name} cannot be made again from the plan",
                    fix="search with --target gguf, which runs without it",
                )
        missing = [name for name in scaled_units(source, recipe) if name not in channel_scales]
        if missing:
            raise HalfbyteError(
                f"{where}: the codes file has no channel scales, expected those of {missing[0]}",
                fix="search again, or use --policy exact",
            )
        self._source, self._recipe, self._scales = source, recipe, channel_scales
        self._index, self._block = -1, nn.Module()

    def weight(self, name: str) -> torch.Tensor:
        """The weight of the linear layer ``name`` inside the blocks, fp32 ``[out, in]``; a reader asks block by block.

        Raises:
            HalfbyteError: values are not finite.
        """
        index, _, part = name.removeprefix(self._source.family.blocks + ".").partition(".")
        weight = linear(self.block(int(index)), part).weight.detach()
        if not bool(torch.stack(torch.aminmax(weight)).isfinite().all()):
            raise HalfbyteError(f"{name}: transformed weights are not finite", fix="check the checkpoint")
        return weight

    def block(self, index: int) -> nn.Module:
        """Block ``index``; the last one is kept."""
        if index != self._index:
            self._index, self._block = -1, nn.Module()  # the last one makes room
            self._block = self._made(index)
            self._index = index
        return self._block

    def _made(self, index: int) -> nn.Module:
        """In the order of preparation: rotations, then unit by unit the channel scales."""
        family, size = self._source.family, head_dim(self._source.config)
        block = block_copy(blocks(self._source.model, family)[index], CPU, torch.float32)
        for transform in self._recipe.applied:
            transform.fold_block_(block, family, size)
        for group in family.groups:
            scales = self._scales.get(f"{family.blocks}.{index}.{group[0]}")
            if scales is not None:
                fold_scales_(block, family, group, scales, head_dim=size)
        return block


def scaled_units(source: SourceModel, recipe: Recipe) -> list[str]:
    """First layers of the units into which ``recipe`` folds channel scales."""
    family = source.family
    behind_norm = [readers for _, readers in family.norm_readers]
    if not any(transform.folds_channel_scales for transform in recipe.applied):
        return []
    groups = [group for group in family.groups if not (recipe.needs_plain_norms and group in behind_norm)]
    count = len(blocks(source.model, family))
    return [f"{family.blocks}.{index}.{group[0]}" for index in range(count) for group in groups]
