"""Choose the channel scales of a unit by the error of its quantised output, and fold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from halfbyte.calibration.walk import TwinStep
from halfbyte.models.families import Family
from halfbyte.models.folding import fold_scales_
from halfbyte.models.modules import linear
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.affine import fake_quantise
from halfbyte.quant.balance import balancing_scales
from halfbyte.quant.int4 import check_finite, fitting_group_size
from halfbyte.quant.quant_linear import InputScheme
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.transforms.smooth import shared_by_query_heads, smoothing_scales

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7)
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLE, OUTPUTS = 512, 1024  # tokens and outputs on which candidates are compared


def sample(batches: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
    """At most ``tokens`` rows, evenly spaced over all batches of ``[tokens, in]``."""
    stride = max(1, sum(len(batch) for batch in batches) // tokens)
    return torch.cat([batch[::stride] for batch in batches])[:tokens]


def scale_unit_(
    step: TwinStep, family: Family, group: tuple[str, ...], recipe: Recipe, scheme: InputScheme, head_dim: int
) -> str:
    """Choose scales for the unit ``group``, fold them into the original block, and scale what was seen of its input.

    Returns:
        what was chosen, e.g. ``rms 0.5``.

    Raises:
        HalfbyteError: activations are not finite.
    """
    block, kept = step.original, step.seen[group[0]]
    layers = [linear(block, part) for part in group]
    weight = torch.cat([layer.weight for layer in layers])  # [out, in]
    where, device = f"{family.blocks}.{step.index}.{group[0]}", weight.device
    powers, largest = zip(*((x.square().sum(0), x.abs().amax(0)) for x in (x.to(device) for x in kept)), strict=True)
    x_power = torch.stack(powers).sum(0) / sum(len(batch) for batch in kept)
    check_finite(x_power, where, "activations are")
    statistics = {
        "x_power": x_power,
        "w_power": weight.square().mean(0),
        "x_absmax": torch.stack(largest).amax(0),
        "w_absmax": weight.abs().amax(0),
    }
    if group == (family.attention_out,):
        rows = linear(block, family.value).weight.shape[0]
        statistics = {name: shared_by_query_heads(value, rows, head_dim) for name, value in statistics.items()}
    candidates = list(_candidates(recipe, statistics))
    if len(candidates) == 1:
        name, scales = candidates[0]
    else:
        stride = max(1, len(weight) // OUTPUTS)
        error = _output_error(sample(kept, SAMPLE).to(device), weight[::stride], recipe, scheme, where)
        name, scales = min(candidates, key=lambda candidate: error(candidate[1]))
    fold_scales_(block, family, group, scales, head_dim=head_dim)
    step.seen[group[0]] = [(batch.to(device) / scales).to(batch.device) for batch in kept]
    return name


def _candidates(recipe: Recipe, known: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and scales ``[in]`` to compare; the first that is as good as any wins."""
    if recipe.quantiser.scales_for_weights:
        for power in POWERS:
            scales = known["x_power"].clamp_min(1e-20).pow(power / 2)
            yield f"AWQ {power:g}", scales / scales.log().mean().exp()
    elif recipe.alpha is not None:
        yield f"absmax {recipe.alpha:g}", smoothing_scales(known["x_absmax"], known["w_absmax"], recipe.alpha)
    else:
        for alpha in ALPHAS:
            yield f"rms {alpha:g}", balancing_scales(known["x_power"], known["w_power"], alpha)
        yield "absmax 0.5", smoothing_scales(known["x_absmax"], known["w_absmax"], 0.5)
        yield "none", torch.ones_like(known["x_power"])


def _output_error(
    x: torch.Tensor, weight: torch.Tensor, recipe: Recipe, scheme: InputScheme, where: str
) -> Callable[[torch.Tensor], float]:
    """Squared error of ``x Wᵀ`` from rounding activations, plus that from rounding weights, as a function of scales."""
    group_size = fitting_group_size(weight.shape[1], recipe.group_size)
    quantiser = recipe.quantiser

    def error(scales: torch.Tensor) -> float:
        inputs, stored = scheme.transform(x / scales), scheme.stored_weight(weight * scales)
        rounded = round_to_nearest(stored, group_size, rule=recipe.scale_rule, where=where).decode()
        total = quantiser.rounding_share * float((inputs @ (rounded - stored).T).square().sum())
        if not quantiser.scales_for_weights:
            noise = fake_quantise(inputs, recipe.scale_bits, symmetric=recipe.symmetric) - inputs
            total += float((noise @ stored.T).square().sum())
        return total

    return error
