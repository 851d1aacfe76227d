"""Weight quantisers: how the codes of a layer are chosen. One file each.

Here is what one says about itself, and what it is told of a layer's weight and inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from halfbyte.core.distributed import Group
from halfbyte.core.registry import Registry

if TYPE_CHECKING:
    from halfbyte.quant.int4 import GroupedWeight, ScaleRule

    Encode = Callable[["InputMoments", int, object, ScaleRule], tuple[GroupedWeight, str]]


@dataclass(frozen=True)
class WeightQuantiser:
    """A way to choose codes.

    Attributes:
        encode: (moments with the weight, group size, name for errors, what scales may be) -> codes of that weight, and
            a note, empty unless something went otherwise than asked.
        looks_at_inputs: moments must have seen calibration tokens; otherwise only ``moments.weight`` is used.
        rounding_share: squared output error of its codes over that of plain rounding, to weigh weights against
            activations when channel scales are chosen.
        scales_for_weights: channel scales are chosen for the weights' error alone, from powers of the activations.
    """

    encode: Encode
    looks_at_inputs: bool
    rounding_share: float
    scales_for_weights: bool = False


QUANTISERS: Registry[WeightQuantiser] = Registry("weight quantiser", "halfbyte.quant.quantisers", "QUANTISER")


@dataclass
class InputMoments:
    """Sums over calibration tokens, for linears that share an input.

    Attributes:
        weight: of those linears stacked, in stored form, fp32 ``[out, in]``.
        hessian: mean of x̂ x̂ᵀ, with x̂ the input as it will be multiplied: from quantised blocks, rounded; ``[in, in]``.
            All means are weighted by what the tokens count.
        away: mean of (x − x̂) x̂ᵀ, with x the same input in the unquantised model; ``[in, in]``. Of layers with fewer
            outputs than inputs it is times W from the left, ``[out, in]``: whichever is smaller.
        tokens: how many were seen.
    """

    weight: torch.Tensor
    hessian: torch.Tensor = field(init=False)
    away: torch.Tensor = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        self._narrow = self.weight.shape[0] < self.weight.shape[1]
        self.hessian = self.weight.new_zeros(self.weight.shape[1], self.weight.shape[1])
        self.away = self.weight.new_zeros(min(self.weight.shape), self.weight.shape[1])

    @property
    def drift(self) -> torch.Tensor:
        """Mean of W (x − x̂) x̂ᵀ, ``[out, in]``."""
        return self.away if self._narrow else self.weight @ self.away

    def merge_(self, group: Group) -> None:
        """Make these the moments of what all processes have seen."""
        own, self.tokens = self.tokens, sum(group.merge([self.tokens]))
        if group.size > 1:
            for mean in (self.hessian, self.away):
                group.sum_(mean.mul_(own / self.tokens))

    def keep_(self, rows: slice) -> None:
        """From here on only some rows of the weight."""
        self.weight = self.weight[rows]
        if self._narrow:
            self.away = self.away[rows]

    def take_hessian(self) -> torch.Tensor:
        """Hand the Hessian over and forget it, to make room."""
        hessian, self.hessian = self.hessian, self.hessian.new_empty(0)
        return hessian

    def add(self, x: torch.Tensor, rounded: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """See one batch: the input in the unquantised model, and as it will be multiplied, fp32 ``[tokens, in]``.

        Args:
            weights: what each token counts, ``[tokens]``, 1 on average over all batches; by default 1.
        """
        if weights is not None:
            root = weights.to(x.device).sqrt().unsqueeze(1)
            x, rounded = x * root, rounded * root
        kept, self.tokens = self.tokens, self.tokens + len(x)
        self.hessian.mul_(kept / self.tokens).addmm_(rounded.T, rounded, alpha=1 / self.tokens)
        away = (x - rounded) @ self.weight.T if self._narrow else x - rounded  # [tokens, out or in]
        self.away.mul_(kept / self.tokens).addmm_(away.T, rounded, alpha=1 / self.tokens)
