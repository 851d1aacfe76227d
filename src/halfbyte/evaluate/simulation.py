"""The PyTorch simulation of a plan: the model with the searched W4 codes, and activations quantised as planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.calibration.text import SOURCES, load_text
from halfbyte.calibration.windows import first_scored
from halfbyte.core.device import made_with, resolve_device, resolve_dtype
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import report
from halfbyte.evaluate.quality import (
    LogitsFile,
    Quality,
    live,
    measure,
    model_logits,
    sample_text,
    scratch_folder,
    windows_for,
)
from halfbyte.models.estimate import check_memory, estimate_load
from halfbyte.models.loading import SourceModel, find, load, stored_dtype
from halfbyte.models.modules import blocks, is_tied, linear, vocabulary
from halfbyte.options import SimulateOptions
from halfbyte.plan import Codes, LayerPlan, Plan, codes_path, load_codes, load_plan, types_path
from halfbyte.quant.ggml.encoded import Encoded
from halfbyte.quant.ggml.types import decode_tensor
from halfbyte.quant.quant_linear import (
    InputScheme,
    SharedInput,
    replace_linear_,
    set_activation_bits_,
    set_parameters_,
)


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
            "the plan was made for another model",
            where=source.origin.model_id,
            expected=f"{plan.model_id} ({plan.fingerprint})",
            got=source.fingerprint,
            fix="pass the plan's model with --model_id",
        )


def become_simulation_(
    source: SourceModel,
    codes: Codes,
    layers: Mapping[str, LayerPlan],
    transforms: Sequence[str],
    *,
    device: torch.device | None = None,
    packed: bool = False,
) -> None:
    """Make the unquantised model its W4A16 simulation, in place: codes, changed parameters, input schemes.

    Args:
        layers, transforms: as in the plan; activation bits are left to ``set_activation_bits_``.
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
                key = (entry.rotated, entry.rank, entry.a4_clip, entry.a_symmetric, entry.rotation_block)
                if key not in schemes:
                    low_rank = codes.low_rank[names[0]].to(device) if entry.rank else None
                    schemes[key] = InputScheme(
                        entry.rotated, low_rank, entry.a4_clip, entry.a_symmetric, entry.rotation_block
                    )
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


def load_types(config: str | Path) -> Encoded:
    """The encoded matrices of the plan at ``config``."""
    encoded = Encoded()
    encoded.add(types_path(config))
    return encoded


def need_activations(plan: Plan, where: object) -> None:
    """Refuse a plan without activation bits."""
    if not plan.layers:
        raise HalfbyteError("the plan has no activation bits", where=where, fix="search with --spaces a4a8 too")


def plan_bits(plan: Plan) -> dict[str, int | None]:
    """Layer name -> activation bits of the plan."""
    return {name: entry.a_bits for name, entry in plan.layers.items()}


def evaluation_text(name: str, searched: str | None) -> tuple[str, str]:
    """(name, text) to evaluate on: not what a plan's search has seen.

    A named source gives its ``eval`` part. A file is used whole, or, if the plan was searched on it, its ``eval`` part.

    Args:
        name: as for :func:`halfbyte.calibration.text.load_text`.
        searched: digest of the plan's search text (``plan.text["search"]``), or None.
    """
    text = load_text(name)
    if text.name in SOURCES or text.record()["search"] == searched:
        return f"{text.name} (eval part)", text.parts["eval"]
    return text.name, Path(text.name).read_text(encoding="utf-8")


@contextmanager
def _types_loaded_(source: SourceModel, plan: Plan, config: str) -> Iterator[None]:
    """The model with the weights of the GGUF file; afterwards its own again."""
    known = dict(source.model.named_parameters(remove_duplicate=False))
    become_types_(source, plan.tensors, load_types(config))
    try:
        yield
    finally:
        for name, parameter in known.items():
            module, _, leaf = name.rpartition(".")
            setattr(source.model.get_submodule(module), leaf, parameter)


@dataclass(frozen=True)
class SimulationRow:
    """One line of the simulation table."""

    name: str
    quality: Quality
    mean_bits: float | None
    sample: str


@dataclass(frozen=True)
class SimulationResult:
    """What ``test_mixed_precision.py`` shows."""

    rows: list[SimulationRow]
    made_by: dict[str, Any]


def simulate(options: SimulateOptions) -> SimulationResult:
    """Original, weights of the GGUF file, all A8, all A4 and the plan, on text the search has not seen.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    plan = load_plan(options.config)
    text_name, text = evaluation_text(options.text, plan.text.get("search"))
    report("load model", 0, 1, options.model_id or plan.model_id)
    source = load_for_plan(
        plan, options.model_id, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    token_windows = windows_for(source, text, options.ctx, options.chunks, where=text_name)
    report("load model", 1, 1, f"text {text_name}, {len(token_windows)} windows of {options.ctx}")
    logits_of = model_logits(source.model)
    rows = []
    with scratch_folder() as folder:
        vocab = vocabulary(source.model, source.family)
        kept = LogitsFile(Path(folder) / "reference", vocab, options.ctx - first_scored(options.ctx) - 1)
        kept.write(token_windows, logits_of, "original")
        original = measure(token_windows, iter(kept))
        rows.append(SimulationRow("original", original, None, sample_text(source, options.prompt, options.max_tokens)))

        def add(name: str, mean_bits: float | None) -> None:
            quality = measure(token_windows, live(token_windows, logits_of, name), iter(kept))
            sample = sample_text(source, options.prompt, options.max_tokens)
            rows.append(SimulationRow(name, quality, mean_bits, sample))

        if plan.tensors:
            with _types_loaded_(source, plan, options.config):
                add("GGUF types", None)
        if plan.layers:
            become_simulation_(source, load_codes(codes_path(options.config)), plan.layers, plan.transforms)
            for name, bits, mean_bits in (
                ("all A8", dict.fromkeys(plan.layers, 8), 8.0),
                ("all A4", dict.fromkeys(plan.layers, 4), 4.0),
                ("plan", plan_bits(plan), 8 * plan.budget_reached),
            ):
                set_activation_bits_(source.model, bits)
                add(name, mean_bits)
    made_by = {"plan": plan.hash, "model": plan.model_id, "text": text_name, "seed": plan.seed, **made_with(source)}
    return SimulationResult(rows, made_by)
