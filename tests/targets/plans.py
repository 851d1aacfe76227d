"""Plans without a search: prepared on random tokens, with given activation bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.core.files import sha256
from halfbyte.models.layers import layers_of, mean_bits_fraction, units_of
from halfbyte.models.loading import SourceModel, find, load
from halfbyte.models.modules import is_tied
from halfbyte.options import SearchOptions
from halfbyte.plan import Plan, codes_path, save_codes, save_plan
from halfbyte.prepare.simulation import plan_bits
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.targets import TARGETS

PLAN = "plan.json"


def plan_for(
    folder: Path,
    path: str | Path = PLAN,
    target: str = "vllm",
    a_bits: Sequence[int] = (8, 4),
    **options: Any,
) -> tuple[SourceModel, Plan]:
    """Write a plan; returns the simulation that a search would have scored, with the plan's bits, and the plan.

    Args:
        a_bits: of the units in turn, again and again.
    """
    if target == "vllm":
        options = {"hardware": "ada", **options}
    asked = SearchOptions(model_id=str(folder), target=target, **options)
    where = TARGETS[target].on(asked.hardware, asked.tensor_parallel)
    source = load(find(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    fingerprint = source.fingerprint
    units = units_of(layers_of(source.model, source.family), source.family, "fused")
    transforms = where.transforms(asked, tied=is_tied(source.model, source.family))
    recipe = replace(where.recipe_for(asked), transforms=transforms)
    tokens = torch.randint(0, len(source.tokenizer), (2, 64), generator=torch.Generator().manual_seed(0))
    prepared = prepare_(source, tokens, recipe, device=source.device)
    genome = [a_bits[index % len(a_bits)] for index in range(len(units))]
    bits = {layer.name: width for unit, width in zip(units, genome, strict=True) for layer in unit.layers}
    save_codes(codes_path(path), prepared.codes)
    plan = Plan(
        model_id=str(folder),
        fingerprint=fingerprint,
        target=target,
        hardware=where.hardware,
        granularity="fused",
        layers={name: replace(entry, a_bits=bits[name]) for name, entry in prepared.layers.items()},
        budget_asked=0.75,
        budget_reached=mean_bits_fraction(units, genome),
        transforms=recipe.transforms,
        weights=asked.weights,
        text={"name": "random tokens"},
        search={
            "fitness": "kl",
            "scores": {"all A8": 0.125, "plan": 0.25},
            "validation": {"plan": 0.5},
            "calib_tokens": 128,
        },
        versions={"halfbyte": "test"},
        codes_sha256=sha256(codes_path(path)),
    )
    save_plan(path, plan)
    set_activation_bits_(source.model, plan_bits(plan))
    return source, plan
