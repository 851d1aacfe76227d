"""Function-preserving rewrites: the unquantised model says the same before and after.

One file each. A transform has hooks that preparation (:mod:`halfbyte.prepare.folding`) calls at fixed moments; what it
does not override does nothing. This module imports no torch, so that names are known quickly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.core.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from halfbyte.calibration.walk import BlockStep
    from halfbyte.models.families import Family
    from halfbyte.prepare.recipe import Recipe
    from halfbyte.quant.quant_linear import InputScheme
    from halfbyte.search.reference import Reference


@dataclass
class UnitStep:
    """One unit of the block that is being prepared: linear layers that share their input.

    Attributes:
        step: the block, with what was seen of its inputs.
        group: paths of the unit's linears in the block.
        recipe: everything else that is done to the model.
        scheme: what happens to the unit's input at run time, as far as that is decided.
        scales: which channel scales were chosen; empty if none were folded.
        channel_scales: those scales, fp32 ``[in]``.
    """

    step: BlockStep
    group: tuple[str, ...]
    family: Family
    head_dim: int
    recipe: Recipe
    scheme: InputScheme
    scales: str = ""
    channel_scales: torch.Tensor | None = None

    @property
    def reads_norm(self) -> bool:
        """Whether a norm makes the unit's input."""
        return any(self.group == readers for _, readers in self.family.norm_readers)

    @property
    def reads_heads(self) -> bool:
        """Whether the attention heads make the unit's input."""
        return self.group == (self.family.attention_out,)


class Transform:
    """A rewrite that can be asked for with ``--transforms``: its properties, and hooks in the order of their calls.

    Attributes:
        order: where it stands in a plan and among the calls of one hook; lower comes first.
        at_run_time: something is left to do at run time; otherwise everything is folded into parameters.
        needs_untied_head: the output head cannot be the embedding.
        needs_plain_norms: norms of the blocks have to stay without scales, so no other transform may fold into them.
        can_be_repeated: what it folds follows from the model and the channel scales alone, not from calibration text.
        folds_channel_scales: it chooses channel scales, which weight quantisers with ``scales_for_weights`` need too.
    """

    order: int = 100
    at_run_time: bool = False
    needs_untied_head: bool = False
    needs_plain_norms: bool = False
    folds_channel_scales: bool = False
    can_be_repeated: bool = True

    def mixes(self, family: Family) -> tuple[str, ...]:
        """Linear layers, by their path in the block (or the head), whose input channels are not the model's own.

        An importance matrix of the model as it was does not fit them.
        """
        return ()

    def outside_blocks(self, family: Family) -> tuple[str, ...]:
        """Modules outside the blocks whose parameters :meth:`change_ends_` rewrites."""
        return ()

    def reference(self, reference: Reference, model: nn.Module, family: Family) -> Reference:
        """The unquantised model's answers for a model that is going to be transformed; called before all others."""
        return reference

    def change_ends_(self, model: nn.Module, family: Family, device: torch.device) -> None:
        """Rewrite embedding, final norm and head, before the walk over the blocks; the head's tensor is kept."""

    def to_stream(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[..., hidden]`` as they are between transformed blocks."""
        return hidden

    def from_stream(self, hidden: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_stream`."""
        return hidden

    def fold_block_(self, block: nn.Module, family: Family, head_dim: int) -> None:
        """Rewrite an unquantised fp32 block, before its inputs are observed."""

    def treat_input_(self, unit: UnitStep) -> None:
        """Say in ``unit.scheme`` what happens to the unit's input at run time, before anything is folded for it."""

    def fold_unit_(self, unit: UnitStep) -> None:
        """Rewrite what makes and what reads the unit's input, and with it what was seen of that input.

        It may extend ``unit.scheme``.
        """


TRANSFORMS: Registry[Transform] = Registry("transform", "halfbyte.transforms", "TRANSFORM")


def in_order(names: Iterable[str]) -> tuple[Transform, ...]:
    """The transforms with these names, each once, in the order in which they are applied."""
    return tuple(TRANSFORMS[name] for name in sorted_names(names))


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, in the order in which their transforms are applied."""
    return tuple(sorted(set(names), key=lambda name: (TRANSFORMS[name].order, name)))
