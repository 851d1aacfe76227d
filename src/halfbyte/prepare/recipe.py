"""What is done to a model before the search, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.quant.int4 import ANY_FP16, ScaleRule
from halfbyte.quant.quantisers import QUANTISERS, WeightQuantiser
from halfbyte.transforms import TRANSFORMS, Transform, in_order

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
        rotation_block: rotations at run time repeat in blocks of the largest power of two, up to this, that divides the
            input of each GPU; 0 if all channels are rotated together.
        tensor_parallel: GPUs that share the inputs of o_proj and down_proj.
        ends_as_stored: R1 leaves embedding and head in the checkpoint's own dtype, as they are exported.
        arithmetic: what layers are computed as (:mod:`halfbyte.quant.arithmetics`).
        a_bits: activation bits that a layer may get, ascending; 16 is not rounded.
        input_groups: activation codes share a scale within groups as large as those of weights, not per token.
    """

    transforms: tuple[str, ...] = ()
    weights: str = "rtn"
    alpha: float | None = None
    group_size: int = 128
    symmetric: bool = False
    clip: bool = True
    scale_bits: int = 4
    scale_rule: ScaleRule = ANY_FP16
    rotation_block: int = 0
    tensor_parallel: int = 1
    ends_as_stored: bool = False
    arithmetic: str = "per_token"
    a_bits: tuple[int, ...] = (4, 8)
    input_groups: bool = False

    @property
    def stream_bits(self) -> int:
        """Activation bits in quantised blocks while later layers are calibrated."""
        return 8 if 8 in self.a_bits else self.a_bits[-1]

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
