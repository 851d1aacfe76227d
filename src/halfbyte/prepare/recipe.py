"""What is done to a model before the search, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfbyte.core.errors import HalfbyteError
from halfbyte.options import SearchOptions
from halfbyte.quant.base import QUANTISERS, WeightQuantiser
from halfbyte.quant.int4 import ANY_FP16, ScaleRule
from halfbyte.transforms import TRANSFORMS, Transform, expand, in_order

A4_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Recipe:
    """Transforms, weight quantiser and activation ranges.

    Attributes:
        transforms: expanded names, see :mod:`halfbyte.transforms`.
        weights: name of the weight quantiser.
        alpha: SmoothQuant strength for all units, or None to choose each unit's channel scales by output error.
        group_size: weights that share a scale.
        symmetric: symmetric activation codes.
        clip: choose the range of 4-bit activations by output error; otherwise it is the token's whole range.
        scale_bits: activation bits whose error counts when channel scales are chosen.
        scale_rule: what a group's scale may be.
        block_rotations: rotations at run time repeat in blocks of the largest power of two that divides the width.
        ends_as_stored: R1 leaves embedding and head in the checkpoint's own dtype, as they are exported.
    """

    transforms: tuple[str, ...] = ()
    weights: str = "rtn"
    alpha: float | None = None
    group_size: int = 128
    symmetric: bool = False
    clip: bool = True
    scale_bits: int = 4
    scale_rule: ScaleRule = ANY_FP16
    block_rotations: bool = False
    ends_as_stored: bool = False

    @property
    def quantiser(self) -> WeightQuantiser:
        """The weight quantiser."""
        return QUANTISERS[self.weights]

    @property
    def applied(self) -> tuple[Transform, ...]:
        """The transforms in order; with one that folds channel scales if the quantiser cannot do without (AWQ)."""
        names = list(self.transforms)
        if self.quantiser.scales_for_weights:
            names += [name for name, known in TRANSFORMS.items() if known.folds_channel_scales]
        return in_order(names)

    @property
    def needs_plain_norms(self) -> bool:
        """Whether nothing may be folded into the norms of blocks."""
        return any(transform.needs_plain_norms for transform in self.applied)


# Engines that read compressed-tensors want symmetric codes of a token's whole range. vLLM keeps scales in the model's
# dtype, mostly bf16; where its Marlin kernel makes them integers it divides by their maximum, as if none were negative.
TARGETS = {
    "sim": Recipe(),
    "gguf": Recipe(scale_bits=8),
    "vllm": Recipe(
        symmetric=True,
        clip=False,
        scale_rule=ScaleRule(bf16=True, signed=False),
        block_rotations=True,
        ends_as_stored=True,
    ),
}


def parse_alpha(text: str) -> float | None:
    """``--alpha``: a number from 0 to 1, or ``auto``."""
    if text == "auto":
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise HalfbyteError("out of range", where="--alpha", expected="0 to 1, or auto", got=text)
    return alpha


def recipe_of(options: SearchOptions, *, tied: bool) -> Recipe:
    """The recipe that the options ask for.

    Args:
        tied: the model's output head is its embedding.

    Raises:
        HalfbyteError: something the target cannot run.
    """
    start = TARGETS[options.target]
    has_codes = options.weights_from is not None  # then nothing can be folded into them
    names = "none" if has_codes else options.transforms
    return replace(
        start,
        transforms=expand(names, options.target, tied=tied, online=options.online_transforms and not has_codes),
        weights="rtn" if has_codes else options.weights,
        alpha=parse_alpha(options.alpha),
        group_size=options.group_size,
        symmetric=start.symmetric or options.symmetric,
    )
