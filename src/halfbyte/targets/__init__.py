"""Where a plan will run. A target is one file: what it can run, what may be chosen, and how a plan becomes files."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.registry import Registry
from halfbyte.options import ExportOptions, SearchOptions
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.int4 import fitting_group_size
from halfbyte.transforms import TRANSFORMS, sorted_names

if TYPE_CHECKING:
    from halfbyte.models.layers import Layer, Unit
    from halfbyte.models.loading import SourceModel

ROTATE = "rotate"  # in --transforms: the rotations that serve a target best
GROUP_MULTIPLE = 32  # weights: blocks of Q4_0, and what vLLM's int4 kernels read at once


class Target(ABC):
    """Where a plan will run, and what follows from that.

    Attributes:
        name: for ``--target``.
        recipe: what preparation obeys: what scales and activation codes may be.
        hardware: what it was made for by :meth:`on`, such as ``sm90``; empty if any will do.
        runs_online: transforms at run time that it can run.
        default_budget: mean activation bits / 8, where none is asked for.
        best: what ``--transforms auto`` stands for.
        export_options: what :meth:`export` is given.
        menus: names of what can be searched, in order (:mod:`halfbyte.menus`); all of it is, unless ``--spaces`` says
            less.
    """

    name: ClassVar[str]
    recipe: ClassVar[Recipe] = Recipe()
    hardware: str = ""
    runs_online: ClassVar[frozenset[str]] = frozenset()
    default_budget: ClassVar[float] = 0.75
    best: ClassVar[str] = "smooth,rotate"
    menus: ClassVar[tuple[str, ...]] = ("activations",)
    export_options: ClassVar[type] = ExportOptions

    def on(self, hardware: str, tensor_parallel: int = 1) -> Target:
        """The target for that hardware.

        Args:
            hardware: of ``--hardware``: a GPU generation, a compute capability such as ``sm90``, or ``auto``.
            tensor_parallel: GPUs that will share every layer.

        Raises:
            HalfbyteError: the target does not depend on hardware, or does not know it.
        """
        if hardware != "auto" or tensor_parallel != 1:
            flag = "hardware" if hardware != "auto" else "tensor_parallel"
            raise HalfbyteError(f"--{flag}: only for --target vllm", fix="leave it out")
        return self

    def widths(self, unit: Unit) -> tuple[int, ...]:
        """The activation bits that a unit may have, ascending; 16 is not rounded."""
        return self.recipe.a_bits

    def rotations(self, *, tied: bool) -> tuple[str, ...]:
        """What ``rotate`` stands for.

        Args:
            tied: the model's output head is its embedding; then R1 would need a second vocabulary matrix.
        """
        return ("r2",) if tied else ("r1", "r2")

    def transforms(self, options: SearchOptions, *, tied: bool) -> tuple[str, ...]:
        """What ``--transforms`` asks for (names, ``rotate``, ``auto`` or ``none``), in the order of application.

        Raises:
            HalfbyteError: an unknown name, or one that the target cannot run.
        """
        if options.weights_from is not None:  # then codes are as they are, and nothing can be folded into them
            return ()
        asked = options.transforms if options.transforms != "auto" else self.best
        names = [] if asked == "none" else [name.strip() for name in asked.split(",")]
        chosen: set[str] = set()
        for name in names:
            chosen |= set(self.rotations(tied=tied)) if name == ROTATE else {name}
        for name in chosen:
            self._check_transform(name)
        return sorted_names(chosen)

    def can_run(self, name: str) -> bool:
        """Whether the target runs a transform: what is folded runs anywhere."""
        return not TRANSFORMS[name].at_run_time or name in self.runs_online

    def _check_transform(self, name: str) -> None:
        if name not in TRANSFORMS.names():
            known = ", ".join(("auto", ROTATE, *TRANSFORMS, "none"))
            raise HalfbyteError(f"--transforms: unknown transform, expected {known}, got {name}")
        if self.can_run(name):
            return
        possible = ", ".join(sorted_names(known for known in TRANSFORMS if self.can_run(known)))
        raise HalfbyteError(
            f"--transforms: the target {self.name} cannot run this transform, expected {possible}, got {name}",
            fix="leave it out, or use --target sim",
        )

    def recipe_for(self, options: SearchOptions) -> Recipe:
        """What preparation has to do, apart from transforms.

        Raises:
            HalfbyteError: ``--alpha`` is out of range.
        """
        return replace(
            self.recipe,
            weights="rtn" if options.weights_from is not None else options.weights,
            alpha=_alpha(options.alpha),
            group_size=options.group_size,
            symmetric=self.recipe.symmetric or options.symmetric,
        )

    def check_options(self, options: SearchOptions) -> None:  # noqa: B027 - most targets have nothing to refuse
        """Refuse, before any work, options that do not fit.

        Raises:
            HalfbyteError: they do not.
        """

    def check_model(  # noqa: B027 - most targets have nothing to refuse
        self, source: SourceModel, layers: Sequence[Layer], options: SearchOptions, group_sizes: Mapping[str, int]
    ) -> None:
        """Refuse, before the search, a model that could not be written or run.

        Args:
            group_sizes: layer -> weights that share a scale, where a checkpoint has chosen them.

        Raises:
            HalfbyteError: it could not.
        """

    def export(self, options: Any) -> Any:
        """Write a plan's files and check them in others' code; nothing is left behind if the check fails.

        Args:
            options: an ``export_options``.

        Raises:
            HalfbyteError: the target has no files, or a check failed.
        """
        raise HalfbyteError(
            f"{self.name}: plans for this target run in PyTorch only", fix="search with --target gguf or vllm"
        )


TARGETS: Registry[Target] = Registry("target", "halfbyte.targets", "TARGET")


def check_groups(layers: Sequence[Layer], group_size: int, group_sizes: Mapping[str, int], *, who: str) -> None:
    """Refuse groups of weights that a format or a kernel cannot hold.

    Raises:
        HalfbyteError: naming the first such layer.
    """
    for layer in layers:
        group = group_sizes.get(layer.name) or fitting_group_size(layer.in_features, group_size)
        if group % GROUP_MULTIPLE:
            fix = "use --group_size 128, or --target sim for this model"
            raise HalfbyteError(
                f"{layer.name}: {who} groups of {GROUP_MULTIPLE} or a multiple, got {group}",
                fix="use --target sim" if group_sizes else fix,
            )


def _alpha(text: str) -> float | None:
    """``--alpha``: a number from 0 to 1, or ``auto``."""
    if text == "auto":
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise HalfbyteError(f"--alpha: out of range, expected 0 to 1, or auto, got {text}")
    return alpha
