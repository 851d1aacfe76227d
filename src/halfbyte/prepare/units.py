"""Quantise one unit: its input scheme, the codes of its layers, and how sensitive they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from halfbyte.calibration.walk import BlockStep, sample
from halfbyte.core.distributed import Group
from halfbyte.models.modules import linear
from halfbyte.prepare.recipe import A4_CLIPS, Recipe
from halfbyte.quant.int4 import GroupedWeight, fitting_group_size
from halfbyte.quant.quant_linear import InputScheme
from halfbyte.quant.quantisers import InputMoments

SAMPLE = 1024  # tokens on which layers are measured
CLIP_SAMPLE, CLIP_OUTPUTS = 512, 512  # tokens and outputs on which activation ranges are compared


@dataclass(frozen=True)
class QuantisedUnit:
    """What became of the layers that share an input.

    Attributes:
        codes: path of the linear in the block -> its codes.
        scheme: what happens to their input.
        note: empty, or what went otherwise than asked.
        errors: path -> mean squared output error with the fewest and with the most activation bits, and mean square of
            the output.
    """

    codes: dict[str, GroupedWeight]
    scheme: InputScheme
    note: str
    errors: dict[str, tuple[float, float, float]]


def quantise_unit(
    step: BlockStep,
    group: tuple[str, ...],
    recipe: Recipe,
    scheme: InputScheme,
    *,
    where: str,
    codes: Mapping[str, GroupedWeight] | None = None,
    token_weights: torch.Tensor | None = None,
) -> QuantisedUnit:
    """Choose the range of 4-bit activations and the codes for the linears of ``group``, which share their input.

    What ``step`` has seen of that input is forgotten on the way, to make room.

    Args:
        codes: path of each linear -> its codes, if they are not to be chosen.
        token_weights: what each token counts where they are, ``[windows, length]``; by default the same.
    """
    layers = [linear(step.original, part) for part in group]
    plain = torch.cat([layer.weight for layer in layers])
    weight = scheme.stored_weight(plain)  # [out, in]
    seen = sample(step.seen[group[0]], SAMPLE, plain.device, step.group)
    inputs = scheme.transform(seen)
    scheme = scheme.rule.calibrated(scheme, (batch.to(plain.device) for batch in step.seen[group[0]]))
    scheme = replace(scheme, scale=min(step.group.merge([scheme.scale])))  # which the largest values decide
    if recipe.clip:
        scheme = replace(scheme, a4_clip=step.group.from_first(_best_clip(inputs, weight, scheme)))
    note = ""
    if not codes:
        codes, note = _chosen(step, group, weight, recipe, scheme, where, token_weights)
    step.seen.pop(group[0], None)
    errors, start = {}, 0
    widths = (recipe.a_bits[0], recipe.a_bits[-1])
    rounded = {bits: scheme.rounded(inputs, bits) for bits in widths}
    for part, layer in zip(group, layers, strict=True):
        rows = slice(start, start + layer.weight.shape[0])
        expected = seen @ plain[rows].T
        made = {bits: rounded[bits] @ scheme.rule.decoded(codes[part], bits).T for bits in widths}
        low, high = (float((made[bits] - expected).square().mean()) for bits in widths)
        errors[part] = (low, high, float(expected.square().mean()))
        start = rows.stop
    return QuantisedUnit(dict(codes), scheme, note, step.group.from_first(errors))


def _chosen(
    step: BlockStep,
    group: tuple[str, ...],
    weight: torch.Tensor,
    recipe: Recipe,
    scheme: InputScheme,
    where: str,
    token_weights: torch.Tensor | None,
) -> tuple[dict[str, GroupedWeight], str]:
    """Codes by the recipe's quantiser for ``weight`` ``[out, in]``, that of all linears stacked, and its note."""
    moments = InputMoments(weight)
    if recipe.quantiser.looks_at_inputs:
        for original, of_copy, counts in step.inputs(group[0], token_weights):
            moments.add(
                scheme.transform(original), scheme.rounded(scheme.transform(of_copy), recipe.stream_bits), counts
            )
        moments.merge_(step.group)
    del step.seen[group[0]]
    codes, scales, own, note = _encoded(moments, recipe, step.group, where)
    outputs = [linear(step.original, part).weight.shape[0] for part in group]
    rows = zip(codes.split(outputs), scales.split(outputs), strict=True)
    return {part: GroupedWeight(*of, own.bits, own.grid) for part, of in zip(group, rows, strict=True)}, note


def _encoded(
    moments: InputMoments, recipe: Recipe, group: Group, where: str
) -> tuple[torch.Tensor, torch.Tensor, GroupedWeight, str]:
    """Codes and scales of all rows, those that this process chose, and a note. Processes share rows where they can."""
    out, inputs = moments.weight.shape
    shared = recipe.scale_rule.by_row and out >= group.size > 1
    if shared:
        ends = [out * rank // group.size for rank in (group.rank, group.rank + 1)]
        moments.keep_(slice(*ends))
    own, note = recipe.quantiser.encode(
        moments, fitting_group_size(inputs, recipe.group_size), where, recipe.scale_rule
    )
    both = [own.codes, own.scales]
    codes, scales = (torch.cat(group.merge_rows([part])) for part in both) if shared else group.first_rows(both)
    return codes, scales, own, group.from_first(note)


def _best_clip(inputs: torch.Tensor, weight: torch.Tensor, scheme: InputScheme) -> float:
    """The share of a token's range whose 4-bit codes give the least output error, on some tokens and outputs."""
    inputs = inputs[:: max(1, len(inputs) // CLIP_SAMPLE)]
    weight = weight[:: max(1, len(weight) // CLIP_OUTPUTS)]

    def error(clip: float) -> float:
        noise = replace(scheme, a4_clip=clip).rounded(inputs, 4) - inputs
        return float((noise @ weight.T).square().sum())

    return min(A4_CLIPS, key=error)
