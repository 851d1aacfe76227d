"""R2: every attention head is rotated between v and o, folded into both."""

from __future__ import annotations

from torch import nn

from halfbyte.models.families import Family
from halfbyte.models.modules import linear
from halfbyte.quant.hadamard import rotation_matrix
from halfbyte.transforms import Transform
from halfbyte.transforms._rotation import transform_heads_


class R2(Transform):
    """See the module."""

    order = 30

    def mixes(self, family: Family) -> tuple[str, ...]:
        """What reads the heads."""
        return (family.attention_out,)

    def fold_block_(self, block: nn.Module, family: Family, head_dim: int) -> None:
        """The same rotation for every head."""
        value = linear(block, family.value).weight
        turn = rotation_matrix(head_dim).to(value).expand(value.shape[0] // head_dim, -1, -1)
        transform_heads_(block, family, turn, turn.mT, head_dim)


TRANSFORM = R2()
