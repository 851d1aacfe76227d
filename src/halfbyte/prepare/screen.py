"""Which transforms help a mixture of types: tried on some blocks, judged by the whole model's KL on unseen text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from halfbyte.calibration.blocks import block_copy, call_block, capture
from halfbyte.calibration.twins import TwinStep
from halfbyte.formats.ggml import bits_per_weight, decode_tensor
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import blocks, linear
from halfbyte.prepare.candidates import BATCH_TOKENS, fold_, hessian_of
from halfbyte.prepare.menus import TensorMenu
from halfbyte.prepare.recipe import Recipe
from halfbyte.progress import Progress, Reporter
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.reference import Reference
from halfbyte.weights.on_grid import Job, encode_

VARIANTS: tuple[tuple[str, ...], ...] = ((), ("smooth",), ("r2",), ("smooth", "r2"))
BLOCKS = 6  # that are tried, evenly spaced
TOKENS = 8192  # of calibration text
STAGE = "transforms that help"


def screened(
    source: SourceModel, tokens: torch.Tensor, judged: torch.Tensor, known: Reference, menus: Sequence[TensorMenu],
    mean_bits: float, weights: str, report: Reporter, *, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """KL of each of ``VARIANTS`` on the text ``judged``, nats per token: its names joined by commas -> KL.

    ``BLOCKS`` blocks are quantised to the types nearest to ``mean_bits``, the others are not. The model stays as it is.

    Args:
        tokens: calibration text, int64 ``[windows, length]``; some of it is used.
        known: the unquantised model's answers on ``judged``.
        weights: name of the weight quantiser.
    """
    model, family = source.model, source.family
    layers = blocks(model, family)
    chosen = sorted({round(at * (len(layers) - 1) / max(1, BLOCKS - 1)) for at in range(BLOCKS)})
    types = {menu.name: min(menu.types, key=lambda kind: abs(bits_per_weight(kind) - mean_bits)) for menu in menus}
    recipes = {variant: Recipe(variant, weights, group_size=32, scale_bits=8) for variant in VARIANTS}
    made: dict[tuple[str, ...], dict[int, nn.Module]] = {variant: {} for variant in VARIANTS}
    batch = 1 if device.type == "cpu" else max(1, BATCH_TOKENS // tokens.shape[1])
    inputs = capture(model, family, tokens[: max(1, TOKENS // tokens.shape[1])], device=device, batch=batch)
    hidden = inputs.hidden
    for index, layer in enumerate(layers):
        if index in chosen:
            for variant, recipe in recipes.items():
                pairs = [(states.float(), states.float()) for states in hidden]
                copied = block_copy(layer, device, torch.float32)
                step = TwinStep(index, copied, pairs, inputs.kwargs, family.attention_out)
                fold_(step, source, recipe)
                _quantise_(step, source, types, recipe)
                made[variant][index] = step.original.to(source.dtype)
            report(Progress(STAGE, index, len(layers), f"block {index}"))
        if index < chosen[-1]:
            own = layer if next(layer.parameters()).device == device else block_copy(layer, device)
            hidden = [call_block(own, states, inputs.kwargs) for states in hidden]
    found = {}
    holder = model.get_submodule(family.blocks)
    where = source.device
    model.to(device)
    for variant, own in made.items():
        for index, block in own.items():
            setattr(holder, str(index), block)
        found[",".join(variant)] = KLEvaluator(model, family, [], judged, known).score(())
        for index in own:
            setattr(holder, str(index), layers[index])
    model.to(where)
    report(Progress(STAGE, 1, 1, ", ".join(f"{name or 'none'} {loss:.4g}" for name, loss in found.items())))
    return found


def _quantise_(step: TwinStep, source: SourceModel, types: Mapping[str, str], recipe: Recipe) -> None:
    """Round the original's weights, in place."""
    family = source.family
    for group in family.groups:
        first = f"{family.blocks}.{step.index}.{group[0]}"
        known, importance = hessian_of(step.seen.pop(group[0]), first)
        for part in group:
            name = f"{family.blocks}.{step.index}.{part}"
            layer = linear(step.original, part)
            job = Job(layer.weight.float(), types[name], name)
            encode_([job], importance, known, feedback=recipe.quantiser.looks_at_inputs)
            with torch.no_grad():
                layer.weight.copy_(decode_tensor(job.rows, job.type))
