"""Channel scales that move the spread of activations into the weights, or back (Xiao et al. 2023, arXiv:2211.10438).

Activations of a unit are divided by s, its weights multiplied. The division is folded into whatever makes the
activation: a norm, the rows of v_proj (per head, shared by the query heads of a group), the rows of up_proj. Of several
rules for s each unit takes the one with the least error of its quantised output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from halfbyte.calibration.walk import sample
from halfbyte.models.modules import fold_scales_, linear
from halfbyte.quant.balance import balancing_scales
from halfbyte.quant.int4 import check_finite, fitting_group_size
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.transforms import Transform, UnitStep

if TYPE_CHECKING:
    from halfbyte.prepare.recipe import Recipe

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7)
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLE, OUTPUTS = 256, 512  # tokens and outputs on which candidates are compared


class Smooth(Transform):
    """See the module."""

    order = 10
    folds_channel_scales = True

    def fold_unit_(self, unit: UnitStep) -> None:
        """Choose scales and fold them, unless they would have to go into a norm that stays plain."""
        if not (unit.reads_norm and unit.recipe.needs_plain_norms):
            scale_unit_(unit)


TRANSFORM = Smooth()


def scale_unit_(unit: UnitStep) -> None:
    """Choose scales for the unit, fold them into the original block, and scale what was seen of its input.

    ``unit.scales`` says what was chosen, e.g. ``rms 0.5``.

    Raises:
        HalfbyteError: activations are not finite.
    """
    step, family, group = unit.step, unit.family, unit.group
    block, seen = step.original, step.seen[group[0]]
    weight = torch.cat([linear(block, part).weight for part in group])  # [out, in]
    where, device = f"{family.blocks}.{step.index}.{group[0]}", weight.device
    candidates = list(_candidates(unit.recipe, _statistics(unit, weight, where)))
    if len(candidates) == 1:
        unit.scales, scales = candidates[0]
    else:
        stride = max(1, len(weight) // OUTPUTS)
        error = _output_error(unit, sample(seen, SAMPLE, device, step.group), weight[::stride], where)
        best = min(range(len(candidates)), key=lambda at: error(candidates[at][1]))
        unit.scales, scales = candidates[step.group.from_first(best)]
    (scales,) = step.group.first_rows([scales])
    fold_scales_(block, family, group, scales, head_dim=unit.head_dim)
    unit.channel_scales = scales
    step.seen[group[0]] = [(batch.to(device) / scales).to(batch.device) for batch in seen]


def _statistics(unit: UnitStep, weight: torch.Tensor, where: str) -> dict[str, torch.Tensor]:
    """Mean squares and largest values of inputs and weights per channel, ``[in]`` each."""
    seen, device = unit.step.seen[unit.group[0]], weight.device
    group = unit.step.group
    of_batches = [torch.stack((x.square().sum(0), x.abs().amax(0))) for x in (x.to(device) for x in seen)]  # [2, in]
    powers, largest = torch.stack(group.merge_rows(of_batches)).unbind(1)  # [batches, in]
    x_power = powers.sum(0) / sum(group.merge([len(batch) for batch in seen]))
    check_finite(x_power, where, "activations are")
    statistics = {
        "x_power": x_power,
        "w_power": weight.square().mean(0),
        "x_absmax": largest.amax(0),
        "w_absmax": weight.abs().amax(0),
    }
    if unit.reads_heads:
        rows = linear(unit.step.original, unit.family.value).weight.shape[0]
        statistics = {name: shared_by_query_heads(value, rows, unit.head_dim) for name, value in statistics.items()}
    return statistics


def _candidates(recipe: Recipe, statistics: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and scales ``[in]`` to compare; the first that is as good as any wins."""
    if recipe.quantiser.scales_for_weights:
        for power in POWERS:
            scales = statistics["x_power"].clamp_min(1e-20).pow(power / 2)
            yield f"AWQ {power:g}", scales / scales.log().mean().exp()
    elif recipe.alpha is not None:
        yield f"absmax {recipe.alpha:g}", smoothing_scales(statistics["x_absmax"], statistics["w_absmax"], recipe.alpha)
    else:
        for alpha in ALPHAS:
            yield f"rms {alpha:g}", balancing_scales(statistics["x_power"], statistics["w_power"], alpha)
        yield "absmax 0.5", smoothing_scales(statistics["x_absmax"], statistics["w_absmax"], 0.5)
        yield "none", torch.ones_like(statistics["x_power"])


def _output_error(unit: UnitStep, x: torch.Tensor, weight: torch.Tensor, where: str) -> Callable[[torch.Tensor], float]:
    """Squared error of ``x Wᵀ`` from rounding activations, plus that from rounding weights, as a function of scales."""
    recipe, scheme = unit.recipe, unit.scheme
    group_size = fitting_group_size(weight.shape[1], recipe.group_size)
    quantiser = recipe.quantiser

    def error(scales: torch.Tensor) -> float:
        inputs, stored = scheme.transform(x / scales), scheme.stored_weight(weight * scales)
        rounded = round_to_nearest(stored, group_size, rule=recipe.scale_rule, where=where).decode()
        total = quantiser.rounding_share * float((inputs @ (rounded - stored).T).square().sum())
        if not quantiser.scales_for_weights:
            noise = scheme.rounded(inputs, recipe.scale_bits) - inputs
            total += float((noise @ stored.T).square().sum())
        return total

    return error


def smoothing_scales(x_absmax: torch.Tensor, w_absmax: torch.Tensor, alpha: float, floor: float = 1e-5) -> torch.Tensor:
    """SmoothQuant's own rule (its equation 4): ``max|X_j|^α / max|W_j|^(1−α)`` per channel; dead channels get 1."""
    x, w = x_absmax.float(), w_absmax.float()
    scales = x.clamp_min(floor).pow(alpha) / w.clamp_min(floor).pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), scales.clamp_min(floor), torch.ones_like(scales))


def shared_by_query_heads(channels: torch.Tensor, value_rows: int, head_dim: int) -> torch.Tensor:
    """Largest value per v_proj row among the query heads that read it, in o_proj's order, ``[in]`` -> ``[in]``."""
    heads = channels.view(value_rows // head_dim, -1, head_dim)  # [value heads, query heads per value head, head_dim]
    return heads.amax(dim=1, keepdim=True).expand_as(heads).flatten()
