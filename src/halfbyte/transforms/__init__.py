"""Function-preserving rewrites: the unquantised model says the same before and after.

Which of them a target can run is decided here, before a search starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.core.errors import HalfbyteError


@dataclass(frozen=True)
class Transform:
    """A rewrite that can be asked for with ``--transforms``.

    Attributes:
        about: what it does, for help texts.
        targets: where the result can run.
        on_request: where it can run too, at a price that has to be asked for (``--online_transforms``).
    """

    about: str
    targets: tuple[str, ...]
    on_request: tuple[str, ...] = ()


TRANSFORMS = {
    "smooth": Transform("channel scales folded into norms, v→o and up→down, chosen per unit", ("sim", "gguf", "vllm")),
    "r1": Transform("rotation of the residual stream, folded", ("sim", "gguf", "vllm")),
    "r2": Transform("rotation of every head between v and o, folded", ("sim", "gguf", "vllm")),
    "r3": Transform("rotation of q and k after the rotary embedding, at run time", ("sim",)),
    "r4": Transform("rotation in front of down_proj, at run time", ("sim",), on_request=("vllm",)),
    "online": Transform("rotation in front of every linear layer, at run time", ("sim",)),
    "learned": Transform("low-rank affine transform in front of every linear layer, at run time", ("sim",)),
}
ROTATE = "rotate"  # the rotations that serve a target best


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
    asked = [name for name, known in TRANSFORMS.items() if online and target in known.on_request]
    chosen = list(asked)
    for name in (part.strip() for part in names.split(",")) if names != "none" else ():
        chosen += rotations if name == ROTATE else (name,)
    for name in chosen:
        if name not in TRANSFORMS:
            raise HalfbyteError(
                "unknown transform",
                where="--transforms",
                expected=", ".join(("auto", ROTATE, *TRANSFORMS, "none")),
                got=name,
            )
        if target not in TRANSFORMS[name].targets and name not in asked:
            cannot, ask = "cannot run this transform", ""
            if target in TRANSFORMS[name].on_request:
                cannot, ask = "runs this transform on request only", "ask for it with --online_transforms, "
            raise HalfbyteError(
                f"the target {target} {cannot}",
                where="--transforms",
                got=name,
                expected=", ".join(name for name, known in TRANSFORMS.items() if target in known.targets),
                fix=f"{ask}leave it out, or use --target sim",
            )
    return tuple(name for name in TRANSFORMS if name in chosen)
