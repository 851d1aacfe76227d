"""Which transforms help a mixture of types: tried on some blocks, compared by the whole model's KL on unseen text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from halfbyte.calibration.walk import BlockStep, block_copy, call_block, capture
from halfbyte.core.precision import products
from halfbyte.core.progress import report
from halfbyte.models.estimate import windows_at_once
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import blocks, is_tied, linear
from halfbyte.prepare.candidates import TensorMenu, hessian_of, power_of
from halfbyte.prepare.folding import fold_block_
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.ggml.encoded import StoredMatrix
from halfbyte.quant.ggml.gptq import Job, encode_
from halfbyte.quant.ggml.inputs import InputRounding
from halfbyte.quant.ggml.types import bits_per_weight, decode_tensor
from halfbyte.search.reference import Reference

Variant = tuple[str, ...]
VARIANTS: tuple[Variant, ...] = ((), ("smooth",), ("r2",), ("smooth", "r2"))
WITH_R1: tuple[Variant, ...] = (("r1",), ("smooth", "r1"), ("r1", "r2"), ("smooth", "r1", "r2"))  # for an untied head
BLOCKS = 6  # that are tried, evenly spaced
TOKENS = 8192  # of calibration text
STAGE = "transforms that help"


@products(exact=False)
def screened(
    source: SourceModel,
    tokens: torch.Tensor,
    search_tokens: torch.Tensor,
    reference: Reference,
    menus: Sequence[TensorMenu],
    mean_bits: float,
    weights: str,
    *,
    device: torch.device,
    keep_on: torch.device | None = None,
) -> dict[str, float]:
    """KL of each variant on ``search_tokens``, nats per token: its names joined by commas -> KL.

    ``BLOCKS`` blocks are quantised to the types nearest to ``mean_bits``, the others are not. One walk over the blocks
    carries all variants, so a block is on the device once. A residual stream that R1 rotates is turned back behind
    each tried block: what lies between is the same function in either. The model stays as it is.

    Args:
        tokens: calibration text, int64 ``[windows, length]``; some of it is used.
        reference: the unquantised model's answers on ``search_tokens``.
        weights: name of the weight quantiser.
        keep_on: where calibration activations are kept, by default on ``device``.
    """
    model, family = source.model, source.family
    layers = blocks(model, family)
    chosen = sorted({round(at * (len(layers) - 1) / max(1, BLOCKS - 1)) for at in range(BLOCKS)})
    types = {menu.name: min(menu.types, key=lambda kind: abs(bits_per_weight(kind) - mean_bits)) for menu in menus}
    variants = VARIANTS if is_tied(model, family) else VARIANTS + WITH_R1
    recipes = {variant: Recipe(variant, weights, group_size=32, scale_bits=8) for variant in variants}
    at_once = windows_at_once(device, tokens.shape[1])
    inputs = capture(model, family, tokens[: max(1, TOKENS // tokens.shape[1])], device=device, batch=at_once)
    answers = capture(model, family, search_tokens, device=device, batch=at_once)
    hidden, states = inputs.hidden, dict.fromkeys(variants, answers.hidden)
    for index, layer in enumerate(layers):
        own = layer if next(layer.parameters()).device == device else block_copy(layer, device)
        if index in chosen:
            rounded = _Rounded()
            for variant, recipe in recipes.items():
                turned = [_to_stream(part.float(), recipe).to(keep_on or device) for part in hidden]
                pairs, copied = list(zip(turned, turned, strict=True)), block_copy(own, device, torch.float32)
                step = BlockStep(index, copied, pairs, inputs.kwargs, family.attention_out)
                del turned, pairs, copied
                block = _tried(source, step, recipe, types, rounded)
                del step
                states[variant] = [_through(block, part, answers.kwargs, recipe) for part in states[variant]]
                del block
            report(STAGE, index, len(layers), f"block {index}")
        else:
            states = {
                variant: [call_block(own, part, answers.kwargs) for part in parts] for variant, parts in states.items()
            }
        if index < chosen[-1]:
            hidden = [call_block(own, part, inputs.kwargs) for part in hidden]
    norm = copy.deepcopy(model.get_submodule(family.final_norm)).to(device)
    head = StoredMatrix(linear(model, family.head).weight.detach(), device)
    found = {",".join(variant): _mean_kl(norm, head, parts, reference) for variant, parts in states.items()}
    report(STAGE, 1, 1, ", ".join(f"{name or 'none'} {loss:.4g}" for name, loss in found.items()))
    return found


def _tried(
    source: SourceModel, step: BlockStep, recipe: Recipe, types: Mapping[str, str], rounded: _Rounded
) -> nn.Module:
    """The step's block, transformed and rounded, on its device and in the model's dtype."""
    fold_block_(step, source, recipe)
    _round_(step, source, types, recipe, rounded)
    return step.original.to(source.dtype)


def _to_stream(hidden: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    for transform in recipe.applied:
        hidden = transform.to_stream(hidden)
    return hidden


def _through(block: nn.Module, hidden: torch.Tensor, kwargs: Mapping[str, Any], recipe: Recipe) -> torch.Tensor:
    """``hidden`` ``[windows, length, hidden]`` after a block, whose own residual stream may be a rotated one."""
    after = call_block(block, _to_stream(hidden, recipe), kwargs)
    for transform in reversed(recipe.applied):
        after = transform.from_stream(after)
    return after


def _mean_kl(norm: nn.Module, head: StoredMatrix, states: Sequence[torch.Tensor], reference: Reference) -> float:
    """Over all tokens, from what the last block made of each batch."""
    total, start = 0.0, 0
    with torch.no_grad():
        for part in states:
            windows = torch.arange(start, start + len(part), device=part.device)
            total += float(reference.kl(head, norm(part).flatten(0, 1), windows).double().sum())
            start += len(part)
    return total / reference.negentropy.numel()


class _Matrix(NamedTuple):
    """What tells a weight and its input from others, and does not change with the last bits of either."""

    rows: torch.Tensor  # mean square of each row, [out]
    columns: torch.Tensor  # and of each column, [in]
    channels: torch.Tensor  # and of each input channel, [in]

    def is_like(self, other: _Matrix) -> bool:
        pairs = zip(self, other, strict=True)
        return all(torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6 * float(theirs.mean())) for mine, theirs in pairs)


class _Rounded:
    """The matrices of a block that some variant has rounded; what another one leaves as it is need not be done again.

    R2 changes only v and o, and with R1 ``smooth`` leaves q, k and gate alone.
    """

    def __init__(self) -> None:
        self._made: dict[str, list[tuple[_Matrix, torch.Tensor]]] = {}

    def find(self, part: str, matrix: _Matrix) -> torch.Tensor | None:
        """Its rounded weight, if there is one."""
        return next((weight for other, weight in self._made.get(part, ()) if matrix.is_like(other)), None)

    def add(self, part: str, matrix: _Matrix, weight: torch.Tensor) -> None:
        """Remember a rounded weight, in main memory."""
        self._made.setdefault(part, []).append((matrix, weight.cpu()))


def _round_(step: BlockStep, source: SourceModel, types: Mapping[str, str], recipe: Recipe, rounded: _Rounded) -> None:
    """Round the original's weights, in place, and from then on the inputs that they get."""
    family = source.family
    for group in family.groups:
        seen, hessian = step.seen.pop(group[0]), None
        device = linear(step.original, group[0]).weight.device
        power = power_of(seen, f"{family.blocks}.{step.index}.{group[0]}", device)
        for part in group:
            name = f"{family.blocks}.{step.index}.{part}"
            layer = linear(step.original, part)
            matrix = _Matrix(layer.weight.square().mean(1), layer.weight.square().mean(0), power)
            weight = rounded.find(part, matrix)
            if weight is None:
                hessian = hessian or hessian_of(seen, name, device)
                job = Job(layer.weight.float(), types[name], name)
                encode_([job], hessian[1], hessian[0], plain=not recipe.quantiser.looks_at_inputs)
                weight = decode_tensor(job.rows, job.type, source.dtype)
                rounded.add(part, matrix, weight)
            with torch.no_grad():
                layer.weight.copy_(weight)
            InputRounding(layer, types[name])
