"""The PyTorch simulation of a plan: the model with the searched W4 codes, and activations quantised as planned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from halfbyte.core.environment import resolve_device, resolve_dtype
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.estimate import check_memory, estimate_load
from halfbyte.models.loading import SourceModel, find, load, stored_dtype
from halfbyte.models.modules import blocks, is_tied, linear
from halfbyte.plan import Codes, LayerPlan, Plan, types_path
from halfbyte.quant.ggml.encoded import Encoded
from halfbyte.quant.ggml.inputs import InputRounding
from halfbyte.quant.ggml.types import decode_tensor
from halfbyte.quant.quant_linear import InputScheme, SharedInput, replace_linear_, set_parameters_


def load_for_plan(
    plan: Plan, model_id: str | None, *, device: str, dtype: str, trust_remote_code: bool = False, packed: bool = False
) -> SourceModel:
    """The model a plan was made for, unquantised.

    Args:
        dtype: ``auto``, ``bf16``, ``fp32``, or ``stored``: bf16 if the checkpoint is, else fp32.
        packed: it will only become a packed simulation: less memory is enough, weights with codes are not read.

    Raises:
        HalfbyteError: the model at hand is another one.
    """
    name = model_id or plan.model_id
    where = resolve_device(device)
    origin = find(name, trust_remote_code=trust_remote_code)
    chosen = stored_dtype(origin) if dtype == "stored" else resolve_dtype(dtype, where)
    check_memory(estimate_load(origin.config, origin.family, chosen, with_codes=True, packed=packed), where)
    unused = {f"{name}.weight" for name in plan.layers} if packed else ()
    source = load(origin, device=where, dtype=chosen, unused=unused)
    check_same_model(source, plan)
    return source


def check_same_model(source: SourceModel, plan: Plan) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        HalfbyteError: naming both.
    """
    if source.fingerprint != plan.fingerprint:
        raise HalfbyteError(
            f"{source.origin.model_id}: the plan was made for another model, expected {plan.model_id} "
            f"({plan.fingerprint}), got {source.fingerprint}",
            fix="pass the plan's model with --model_id",
        )


def become_simulation_(
    source: SourceModel,
    codes: Codes,
    layers: Mapping[str, LayerPlan],
    *,
    device: torch.device | None = None,
    packed: bool = False,
) -> None:
    """Make the unquantised model its W4A16 simulation, in place: codes, changed parameters, input schemes.

    Args:
        layers: as in the plan; activation bits are left to ``set_activation_bits_``.
        device: where the blocks go, one after the other; by default where the model is.
        packed: keep the codes packed, for the same numbers from a quarter of the memory.
    """
    model, family = source.model, source.family
    set_parameters_(model, codes.parameters)
    shared = SharedInput()
    device = device or source.device
    for index, block in enumerate(blocks(model, family)):
        block.to(device)
        for group in family.groups:
            names = [f"{family.blocks}.{index}.{part}" for part in group]
            schemes: dict[tuple, InputScheme] = {}
            for name in names:
                entry = layers[name]
                rounding = (entry.a4_clip, entry.a_symmetric, entry.rotation_block, entry.arithmetic)
                rounding += (entry.a_group, entry.a_scale)
                key = (entry.rotated, entry.rank, *rounding)
                if key not in schemes:
                    low_rank = codes.low_rank.get(names[0]) if entry.rank else None
                    if entry.rank and low_rank is None:
                        raise HalfbyteError(f"{name}: the plan has a learned transform, the codes have none")
                    low_rank = low_rank and low_rank.to(device)
                    schemes[key] = InputScheme(entry.rotated, low_rank, *rounding)
                replace_linear_(model, name, codes.weights[name], shared, schemes[key], packed=packed)


def become_types_(source: SourceModel, types: Mapping[str, str], encoded: Encoded) -> None:
    """Give the unquantised model the weights of a GGUF file with the plan's types, in place; activations stay."""
    set_parameters_(source.model, encoded.extra)
    tied = is_tied(source.model, source.family)
    for name, kind in types.items():
        layer = linear(source.model, name)
        rows = encoded.rows(name, kind).to(layer.weight.device)
        layer.weight = nn.Parameter(decode_tensor(rows, kind).to(layer.weight.dtype), requires_grad=False)
        if tied and name == source.family.embedding:
            linear(source.model, source.family.head).weight = layer.weight


def round_inputs_(source: SourceModel, types: Mapping[str, str]) -> list[InputRounding]:
    """Round the inputs of all matrices as llama.cpp does for their types; what is returned does it, and can be removed.

    What this loses is what llama.cpp loses; single answers differ, since a last bit can move an input to the next step.
    """
    reading = {name: kind for name, kind in types.items() if name != source.family.embedding}
    if is_tied(source.model, source.family):
        reading[source.family.head] = types[source.family.embedding]
    return [InputRounding(linear(source.model, name), kind) for name, kind in reading.items()]


def load_types(config: str | Path) -> Encoded:
    """The encoded matrices of the plan at ``config``."""
    encoded = Encoded()
    encoded.add(types_path(config))
    return encoded


def need_activations(plan: Plan, where: object) -> None:
    """Refuse a plan without activation bits."""
    if not plan.layers:
        raise HalfbyteError(f"{where}: the plan has no activation bits", fix="search with --spaces activations too")


def plan_bits(plan: Plan) -> dict[str, int | None]:
    """Layer name -> activation bits of the plan."""
    return {name: entry.a_bits for name, entry in plan.layers.items()}
