"""Function-preserving rewrites: the unquantised model says the same before and after.

Which of them a target can run is decided here, before a search starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.errors import HalfbyteError


@dataclass(frozen=True)
class Transform:
    """A rewrite that can be asked for with ``--transforms``.

    Attributes:
        about: what it does, for help texts.
        targets: where the result can run.
    """

    about: str
    targets: tuple[str, ...]


TRANSFORMS = {
    "smooth": Transform("channel scales folded into norms, v→o and up→down, chosen per unit", ("sim", "gguf")),
    "r1": Transform("rotation of the residual stream, folded", ("sim", "gguf")),
    "r2": Transform("rotation of every head between v and o, folded", ("sim", "gguf")),
    "r3": Transform("rotation of q and k after the rotary embedding, at run time", ("sim",)),
    "r4": Transform("rotation in front of down_proj, at run time", ("sim",)),
    "online": Transform("rotation in front of every linear layer, at run time", ("sim",)),
    "learned": Transform("low-rank affine transform in front of every linear layer, at run time", ("sim",)),
}
ROTATE = "rotate"  # the rotations that serve a target best


def expand(names: str, target: str, *, tied: bool) -> tuple[str, ...]:
    """``--transforms``: a comma list of names, ``none``, or ``auto``, as what is really done, in order.

    ``auto`` is the best that the target can run: ``smooth,rotate``, and for ``sim`` also ``learned``. ``rotate`` is
    ``online`` for ``sim`` (smoothing stays possible everywhere), ``r1,r2`` for ``gguf``; with an output head that is
    tied to the embedding only ``r2``, because R1 would need a second vocabulary matrix in the file.

    Raises:
        HalfbyteError: an unknown name, or one that the target cannot run.
    """
    if names == "none":
        return ()
    if names == "auto":
        names = "smooth,rotate,learned" if target == "sim" else "smooth,rotate"
    rotations = {"sim": ("online",), "gguf": ("r2",) if tied else ("r1", "r2")}[target]
    chosen: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        chosen += rotations if name == ROTATE else (name,)
    for name in chosen:
        if name not in TRANSFORMS:
            raise HalfbyteError(
                "unknown transform", where="--transforms", expected=", ".join(("auto", ROTATE, *TRANSFORMS, "none")),
                got=name,
            )  # fmt: skip
        if target not in TRANSFORMS[name].targets:
            raise HalfbyteError(
                f"the target {target} cannot run this transform", where="--transforms", got=name,
                expected=", ".join(name for name, known in TRANSFORMS.items() if target in known.targets),
                fix="leave it out, or use --target sim",
            )  # fmt: skip
    return tuple(name for name in TRANSFORMS if name in chosen)
