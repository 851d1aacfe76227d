"""The unquantised weights as preparation transformed them, made again from the model and what the plan keeps.

Preparation folds rotations and channel scales into a copy of each block and quantises that copy, of which only the
codes stay. A file that stores some layers in more bits needs the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from halfbyte.calibration.walk import block_copy
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import blocks, fold_scales_, head_dim, linear
from halfbyte.prepare.recipe import Recipe
from halfbyte.transforms import TRANSFORMS

CPU = torch.device("cpu")


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
