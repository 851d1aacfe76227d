"""What a search refuses before any work, and which menus it has."""

from __future__ import annotations

from pathlib import Path

from halfbyte.core.errors import HalfbyteError
from halfbyte.menus import MENUS, Menu
from halfbyte.options import SearchOptions
from halfbyte.plan import check_suffix
from halfbyte.targets import Target

OTHER_NAMES = {"a4a8": "activations", "ggml": "types"}  # of menus, in older commands


def menus_of(options: SearchOptions, target: Target) -> dict[str, type[Menu]]:
    """What is searched, in order.

    Raises:
        HalfbyteError: something that the target does not have.
    """
    there = {name: MENUS[name] for name in target.menus}
    if options.spaces == "auto":
        return there if options.weights_from is None else {"activations": there["activations"]}
    asked = [OTHER_NAMES.get(name.strip(), name.strip()) for name in options.spaces.split(",")]
    for name in asked:
        if name not in there:
            raise HalfbyteError(
                f"--spaces: the target {target.name} does not have this, expected {', '.join(there)}, got {name}",
                fix="use --target gguf" if name == "types" else None,
            )
    return {name: menu for name, menu in there.items() if name in asked}


def weights_of(options: SearchOptions) -> str:
    """The weight quantiser, or the checkpoint whose codes were taken over: ``from NAME``."""
    if options.weights_from is None:
        return options.weights
    return f"from {Path(options.weights_from).expanduser().resolve().name}"


def check_options(options: SearchOptions, target: Target) -> None:
    """Refuse, before any work, values that cannot be right.

    Raises:
        HalfbyteError: the first that is not.
    """
    if not 0.5 <= options.target_compression <= 1.0:
        raise HalfbyteError(
            "--target_compression: budget is out of range, expected 0.5 (all A4) to 1.0 (all A8), "
            f"got {options.target_compression}"
        )
    for flag in ("ga_pop", "group_size", "ctx"):
        if getattr(options, flag) < 1:
            raise HalfbyteError(f"--{flag}: must be positive, got {getattr(options, flag)}")
    for flag in ("calib_tokens", "search_tokens", "ga_gen"):
        if getattr(options, flag) < 0:
            raise HalfbyteError(f"--{flag}: must be positive, or 0 for what the machine can do", fix="leave it out")
    check_suffix(Path(options.output))
    if options.pareto and options.fitness != "kl":
        raise HalfbyteError("--pareto: a front needs the whole model's KL", fix="leave --fitness at kl")
    target.check_options(options)
    target.recipe_for(options)
    target.transforms(options, tied=False)
    if options.weights_from is not None:
        _check_weights_from(options)
    for flag in ("size", "bpw", "ftype", "imatrix"):
        if getattr(options, flag) and "types" not in menus_of(options, target):
            raise HalfbyteError(
                f"--{flag}: only for types of a GGUF file", fix="search with --target gguf --spaces types"
            )


def _check_weights_from(options: SearchOptions) -> None:
    """Refuse what would change codes that are taken over."""
    usual = SearchOptions()
    if options.online_transforms:
        raise HalfbyteError("--online_transforms: does not go with --weights_from", fix="leave it out")
    allowed = {
        "transforms": ("auto", "none"),
        "weights": (usual.weights,),
        "alpha": (usual.alpha,),
        "spaces": ("auto", "activations", "a4a8"),
    }
    for flag, values in allowed.items():
        got = getattr(options, flag)
        if got not in values:
            raise HalfbyteError(
                f"--{flag}: does not go with --weights_from, whose codes stay as they are, "
                f"expected {' or '.join(values)}, got {got}",
                fix="leave it out",
            )
