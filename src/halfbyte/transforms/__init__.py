"""Function-preserving rewrites: the unquantised model says the same before and after.

One file each. A transform has hooks that preparation (:mod:`halfbyte.prepare.folding`) calls at fixed moments; what it
does not override does nothing. This module imports no torch, so that names are known quickly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.core.errors import HalfbyteError
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
    """

    step: BlockStep
    group: tuple[str, ...]
    family: Family
    head_dim: int
    recipe: Recipe
    scheme: InputScheme
    scales: str = ""

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
        about: what it does, for help texts.
        order: where it stands in a plan and among the calls of one hook; lower comes first.
        at_run_time: something is left to do at run time; otherwise everything is folded into parameters.
        needs_untied_head: the output head cannot be the embedding.
        needs_plain_norms: norms of the blocks have to stay without scales, so no other transform may fold into them.
        folds_channel_scales: it chooses channel scales, which weight quantisers with ``scales_for_weights`` need too.
    """

    about: str = ""
    order: int = 100
    at_run_time: bool = False
    needs_untied_head: bool = False
    needs_plain_norms: bool = False
    folds_channel_scales: bool = False

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
ROTATE = "rotate"  # the rotations that serve a target best
ON_REQUEST = {"vllm": ("r4",)}  # what a target can run at a price that has to be asked for


def in_order(names: Iterable[str]) -> tuple[Transform, ...]:
    """The transforms with these names, each once, in the order in which they are applied."""
    return tuple(TRANSFORMS[name] for name in sorted_names(names))


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, in the order in which their transforms are applied."""
    return tuple(sorted(set(names), key=lambda name: (TRANSFORMS[name].order, name)))


def expand(names: str, target: str, *, tied: bool, online: bool = False) -> tuple[str, ...]:
    """``--transforms``: a comma list of names, ``none``, or ``auto``, as what is really done, in order.

    ``auto`` is the best that the target can run: ``smooth,rotate``, and for ``sim`` also ``learned``. ``rotate`` is
    ``online`` for ``sim`` (smoothing stays possible everywhere), ``r1,r2`` for ``gguf`` and ``vllm``; with an output
    head that is tied to the embedding only ``r2``, because R1 would need a second vocabulary matrix in the file.

    Args:
        online: also take what the target can run on request (R4 for ``vllm``).

    Raises:
        HalfbyteError: an unknown name, or one that the target cannot run.
    """
    if names == "auto":
        names = "smooth,rotate,learned" if target == "sim" else "smooth,rotate"
    rotations = ("online",) if target == "sim" else ("r2",) if tied else ("r1", "r2")
    on_request = ON_REQUEST.get(target, ())
    chosen = list(on_request) if online else []
    for name in (part.strip() for part in names.split(",")) if names != "none" else ():
        chosen += rotations if name == ROTATE else (name,)
    for name in chosen:
        if name not in TRANSFORMS.names():
            known = ", ".join(("auto", ROTATE, *TRANSFORMS, "none"))
            raise HalfbyteError(f"--transforms: unknown transform, expected {known}, got {name}")
        if target != "sim" and TRANSFORMS[name].at_run_time and not (online and name in on_request):
            raise _cannot_run(name, target, on_request)
    return sorted_names(chosen)


def _cannot_run(name: str, target: str, on_request: tuple[str, ...]) -> HalfbyteError:
    folded = ", ".join(known for known in sorted_names(TRANSFORMS) if not TRANSFORMS[known].at_run_time)
    cannot, ask = "cannot run this transform", ""
    if name in on_request:
        cannot, ask = "runs this transform on request only", "ask for it with --online_transforms, "
    return HalfbyteError(
        f"--transforms: the target {target} {cannot}, expected {folded}, got {name}",
        fix=f"{ask}leave it out, or use --target sim",
    )
