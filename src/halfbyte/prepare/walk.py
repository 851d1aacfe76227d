"""Turn a loaded model into its W4 simulation, block by block: smooth, choose codes, measure layers."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from halfbyte.calibration.blocks import walk_blocks
from halfbyte.calibration.gradients import output_gradient_power
from halfbyte.errors import HalfbyteError
from halfbyte.export.plan_file import load_codes, save_codes
from halfbyte.files import write_text
from halfbyte.formats.int_group import GroupedWeight, check_finite, fitting_group_size
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import head_dim, linear
from halfbyte.models.surgery import SharedInput, replace_linear_, set_parameters_
from halfbyte.options import SearchOptions
from halfbyte.progress import Progress, Reporter
from halfbyte.search.sensitivity import LayerSensitivity, measure_block
from halfbyte.spec import Layer
from halfbyte.stages import Stages
from halfbyte.transforms import TRANSFORMS
from halfbyte.transforms.smoothquant import smooth_block_
from halfbyte.weights import QUANTISERS


def parse_transforms(names: str) -> tuple[str, ...]:
    """``--transforms``: a comma list of names, or ``none``."""
    if names == "none":
        return ()
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in TRANSFORMS:
            raise HalfbyteError(
                "unknown transform", where="--transforms", expected=", ".join((*TRANSFORMS, "none")), got=name
            )
    return chosen


def prepare_(
    source: SourceModel,
    layers: list[Layer],
    tokens: torch.Tensor,
    options: SearchOptions,
    stages: Stages,
    report: Reporter,
) -> tuple[dict[str, GroupedWeight], dict[str, LayerSensitivity]]:
    """Smooth, quantise weights and measure layers, block by block; the model becomes its W4 simulation."""
    codes_file = stages.codes
    rows_file = stages.folder / "sensitivity.json"
    if codes_file.exists() and rows_file.exists():
        weights, overrides = load_codes(codes_file)
        set_parameters_(source.model, overrides)
        rows = [LayerSensitivity(**row) for row in json.loads(rows_file.read_text(encoding="utf-8"))]
    else:
        if "smooth" in parse_transforms(options.transforms):
            smooth_(source, tokens, options.alpha, report)
        gradients = _gradients(source, layers, tokens, report) if options.fitness == "fisher" else {}
        weights, rows = _quantise_and_measure(source, layers, tokens, options, gradients, report)
        save_codes(codes_file, weights, _changed_parameters(source, options))
        write_text(rows_file, json.dumps([asdict(row) for row in rows]))
    shared = SharedInput()
    for name, weight in weights.items():
        replace_linear_(source.model, name, weight, shared)
    return weights, {row.layer: row for row in rows}


def smooth_(source: SourceModel, tokens: torch.Tensor, alpha: float, report: Reporter) -> None:
    """Fold SmoothQuant scales into every block, in place; ``tokens`` is ``[windows, length]``."""
    config, family = source.config, source.family
    for step in walk_blocks(source.model, family, tokens, device=source.device):
        largest: dict[str, torch.Tensor] = {}

        def see(x: torch.Tensor, part: str, largest: dict[str, torch.Tensor] = largest) -> None:
            here = x.abs().amax(dim=0)
            largest[part] = torch.maximum(largest[part], here) if part in largest else here

        first_readers = [group[0] for group in family.groups]
        step.forward({part: lambda x, part=part: see(x, part) for part in first_readers})
        for part, values in largest.items():
            check_finite(values, f"{family.blocks}.{step.index}.{part}", "activations are")
        smooth_block_(step.block, family, largest, alpha=alpha, head_dim=head_dim(config))
        report(Progress("SmoothQuant", step.index + 1, config.num_hidden_layers, f"block {step.index}"))


def _gradients(source: SourceModel, layers: list[Layer], tokens: torch.Tensor, report: Reporter) -> dict[str, float]:
    power: dict[str, float] = {}
    for done, power in enumerate(output_gradient_power(source.model, layers, tokens), start=1):  # noqa: B007
        report(Progress("loss gradients", done, len(tokens), f"window {done}"))
    return power


def _quantise_and_measure(
    source: SourceModel,
    layers: list[Layer],
    tokens: torch.Tensor,
    options: SearchOptions,
    gradients: dict[str, float],
    report: Reporter,
) -> tuple[dict[str, GroupedWeight], list[LayerSensitivity]]:
    quantise = QUANTISERS[options.weights]
    weights: dict[str, GroupedWeight] = {}
    rows: list[LayerSensitivity] = []
    by_block: dict[int, dict[str, Layer]] = {}
    for layer in layers:
        prefix = f"{source.family.blocks}.{layer.block}."
        by_block.setdefault(layer.block, {})[layer.name.removeprefix(prefix)] = layer
    for step in walk_blocks(source.model, source.family, tokens, device=source.device):
        members = by_block[step.index]
        codes = {}
        for part, layer in members.items():
            group = fitting_group_size(layer.in_features, options.group_size)
            codes[part] = quantise(linear(step.block, part).weight, group, where=layer.name)
        for row in measure_block(step, members, codes, symmetric=options.symmetric):
            rows.append(LayerSensitivity(**{**asdict(row), "grad_power": gradients.get(row.layer, 0.0)}))
        for part, layer in members.items():
            weights[layer.name] = GroupedWeight(codes[part].codes.cpu(), codes[part].scales.cpu(), codes[part].bits)
        report(Progress("W4 codes and layer sensitivity", step.index + 1, len(by_block), f"block {step.index}"))
    return weights, rows


def _changed_parameters(source: SourceModel, options: SearchOptions) -> dict[str, torch.Tensor]:
    """Norms and biases that a transform may have rewritten."""
    if not parse_transforms(options.transforms):
        return {}
    prefix, linears = source.family.blocks + ".", source.family.linears
    changed = {}
    for name, parameter in source.model.named_parameters():
        is_weight = name.endswith(".weight") and any(name.endswith(f"{part}.weight") for part in linears)
        if name.startswith(prefix) and not is_weight:
            changed[name] = parameter.detach().float().cpu()
    return changed
