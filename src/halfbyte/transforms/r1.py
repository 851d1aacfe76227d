"""R1: the residual stream is rotated, and the rotation folded into everything that reads or writes it.

RMSNorm without a scale commutes with a rotation, so every norm's scale is first moved into the layers that read it;
with h → Q h a reader becomes ``W diag(norm) Qᵀ``, a writer ``Q W``, the embedding ``E Qᵀ``. The output head reads what
the final norm makes, so it cannot stay tied to the embedding.
"""

from __future__ import annotations

import torch
from torch import nn

from halfbyte.models.families import Family
from halfbyte.quant.hadamard import rotate, rotate_back
from halfbyte.search.reference import Reference
from halfbyte.transforms import Transform
from halfbyte.transforms._rotation import rotate_block_, rotate_ends_


class R1(Transform):
    """See the module."""

    order = 20
    needs_untied_head = True
    needs_plain_norms = True

    def mixes(self, family: Family) -> tuple[str, ...]:
        """What reads the stream."""
        return (*(reader for _, readers in family.norm_readers for reader in readers), family.head)

    def outside_blocks(self, family: Family) -> tuple[str, ...]:
        """Both ends of the stream."""
        return (family.embedding, family.final_norm, family.head)

    def reference(self, reference: Reference, model: nn.Module, family: Family) -> Reference:
        """Its vectors in the coordinates of the rotated stream."""
        return reference.for_rotated(model.get_parameter(f"{family.final_norm}.weight"))

    def change_ends_(self, model: nn.Module, family: Family, device: torch.device) -> None:
        """Rotate embedding and head."""
        rotate_ends_(model, family, device)

    def to_stream(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rotated, in its dtype."""
        return rotate(hidden).to(hidden.dtype)

    def from_stream(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rotated back, in its dtype."""
        return rotate_back(hidden).to(hidden.dtype)

    def fold_block_(self, block: nn.Module, family: Family, head_dim: int) -> None:
        """Readers and writers of the stream."""
        rotate_block_(block, family)


TRANSFORM = R1()
