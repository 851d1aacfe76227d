"""Turn a loaded model into its W4 simulation, block by block, and keep the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch

from halfbyte.calibration.walk import TwinStep, walk_twins
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import write_text
from halfbyte.core.progress import report
from halfbyte.evaluate.simulation import become_simulation_
from halfbyte.models.layers import layers_of
from halfbyte.models.loading import SourceModel, stored_dtype
from halfbyte.models.modules import head_dim, linear
from halfbyte.plan import Codes, LayerPlan, load_codes, save_codes
from halfbyte.prepare.channel_scales import scale_unit_
from halfbyte.prepare.checkpoint import Given, adopt_block_, adopt_ends_, adopt_parameters_
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.units import STREAM_BITS, quantise_unit
from halfbyte.quant.hadamard import rotation_matrix
from halfbyte.quant.int4 import GroupedWeight, check_packable
from halfbyte.quant.quant_linear import InputScheme, SharedInput, pack_linear_, replace_linear_, set_activation_bits_
from halfbyte.search.sensitivity import LayerSensitivity
from halfbyte.transforms.attention import rotate_queries_and_keys_
from halfbyte.transforms.learned import balance_heads_, learn_low_rank
from halfbyte.transforms.rotation import rotate_block_, rotate_ends_, round_ends_, transform_heads_
from halfbyte.workdir import Workdir

PREPARED = "prepared.json"
BATCH_TOKENS = 4096  # that go through a block at once on an accelerator


@dataclass
class Prepared:
    """What preparation leaves.

    Attributes:
        codes: for the plan's codes file.
        layers: layer name -> its entry in the plan, with 8-bit activations until a search decides.
        sensitivity: layer name -> measured errors.
        scales: unit (its first layer's name) -> which channel scales were chosen.
    """

    codes: Codes
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    sensitivity: dict[str, LayerSensitivity] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)


def prepare_(
    source: SourceModel,
    tokens: torch.Tensor,
    recipe: Recipe,
    *,
    device: torch.device,
    packed: bool = False,
    given: Given | None = None,
) -> Prepared:
    """Transform and quantise ``source.model`` in place; it becomes its W4 simulation, where it was.

    Blocks visit ``device`` one at a time, in fp32.

    Args:
        tokens: calibration text, int64 ``[windows, length]``.
        packed: blocks that are done keep their codes packed: on the host the same tensors as in the result.
        given: a checkpoint whose codes and other parameters are taken over; the recipe then has no transforms.

    Raises:
        HalfbyteError: values that are not finite, or codes that cannot be packed, with the layer's name.
    """
    family, model = source.family, source.model
    for layer in layers_of(model, family):
        check_packable(layer.in_features, where=layer.name)
    if "r3" in recipe.transforms:
        rotate_queries_and_keys_(model)
    if "r1" in recipe.transforms:
        rotate_ends_(model, family, device)
        if recipe.ends_as_stored:
            round_ends_(model, family, stored_dtype(source.origin))
    if given is not None:
        adopt_ends_(source, given)
    made = Prepared(Codes({}, {}, {}))
    shared = SharedInput()
    batch = 1 if device.type == "cpu" else max(1, BATCH_TOKENS // tokens.shape[1])

    def pack(step: TwinStep) -> None:
        for part in family.linears:
            pack_linear_(step.quantised, part, made.codes.weights[f"{family.blocks}.{step.index}.{part}"])

    for step in walk_twins(model, family, tokens, device=device, batch=batch, leave=pack if packed else None):
        _fold_rotations_(step, source, recipe)
        codes = adopt_block_(step.original, step.index, source, given) if given is not None else None
        step.observe([group[0] for group in family.groups])
        schemes = {group: _scheme(step, source, group, recipe, made) for group in family.groups}
        if given is None:
            step.split()
        else:  # nothing depends on what the quantised blocks make: the original turns into its copy
            adopt_parameters_(step, source, given)
        for group, scheme in schemes.items():
            _quantise_(step, source, group, recipe, scheme, shared, made, codes)
        report("transforms and W4 codes", step.index + 1, source.config.num_hidden_layers, f"block {step.index}")
    set_activation_bits_(model, dict.fromkeys(made.layers, None))
    if given is None:
        made.codes = replace(made.codes, parameters=_changed_parameters(source, recipe))
    else:
        made.codes = replace(made.codes, parameters=given.codes.parameters)
        made.layers = _noted(made.layers, given, recipe)
    return made


def _noted(layers: Mapping[str, LayerPlan], given: Given, recipe: Recipe) -> dict[str, LayerPlan]:
    """The entries with what of the checkpoint is not as asked."""
    return {name: replace(entry, note=given.codes.note(name, recipe.group_size)) for name, entry in layers.items()}


def _fold_rotations_(step: TwinStep, source: SourceModel, recipe: Recipe) -> None:
    family, size = source.family, head_dim(source.config)
    if "r1" in recipe.transforms:
        rotate_block_(step.original, family)
    if "r2" in recipe.transforms:
        value = linear(step.original, family.value).weight
        turn = rotation_matrix(size).to(value).expand(value.shape[0] // size, -1, -1)
        transform_heads_(step.original, family, turn, turn.mT, size)


def _scheme(step: TwinStep, source: SourceModel, group: tuple[str, ...], recipe: Recipe, made: Prepared) -> InputScheme:
    """Fold the unit's channel scales and decide what happens to its input at run time."""
    family = source.family
    width = linear(step.original, group[0]).weight.shape[1]
    scheme = InputScheme(
        rotated=recipe.rotated(group[0], family.down),
        symmetric=recipe.symmetric,
        block=recipe.rotation_block(group[0], family.down, width),
    )
    behind_norm = any(group == readers for _, readers in family.norm_readers)
    if recipe.scales_channels and not (behind_norm and "r1" in recipe.transforms):  # R1 needs norms without scales
        name = f"{family.blocks}.{step.index}.{group[0]}"
        made.scales[name] = scale_unit_(step, family, group, recipe, scheme, head_dim(source.config))
    if "learned" in recipe.transforms:
        if group == (family.attention_out,):
            balance_heads_(step, family, head_dim(source.config))
        return replace(scheme, low_rank=learn_low_rank(step, group))
    return scheme


def _quantise_(
    step: TwinStep,
    source: SourceModel,
    group: tuple[str, ...],
    recipe: Recipe,
    scheme: InputScheme,
    shared: SharedInput,
    made: Prepared,
    given: Mapping[str, GroupedWeight] | None = None,
) -> None:
    prefix = f"{source.family.blocks}.{step.index}."
    own = None if given is None else {part: given[part] for part in group}
    unit = quantise_unit(step, group, recipe, scheme, where=prefix + group[0], given=own)
    low_rank = unit.scheme.low_rank
    if low_rank is not None:
        made.codes.low_rank[prefix + group[0]] = low_rank.to("cpu")
    for part in group:
        name, codes = prefix + part, unit.codes[part]
        made.codes.weights[name] = codes.pack().to("cpu")
        notes = [unit.note] if unit.note else []
        if codes.group_size != recipe.group_size:
            notes.append(f"group {codes.group_size}: {recipe.group_size} does not divide {codes.shape[1]}")
        made.layers[name] = LayerPlan(
            w_bits=codes.bits,
            a_bits=8,
            group_size=codes.group_size,
            a_symmetric=unit.scheme.symmetric,
            note="; ".join(notes),
            a4_clip=unit.scheme.a4_clip,
            rotated=unit.scheme.rotated,
            rank=low_rank.rank if low_rank else 0,
            rotation_block=unit.scheme.block,
        )
        row = LayerSensitivity(name, *unit.errors[part])
        if not all(value < float("inf") for value in (row.mse_a4, row.mse_a8, row.power)):
            raise HalfbyteError(
                "activations are not finite",
                where=name,
                got="NaN or Inf during calibration",
                fix="compute in fp32 (--dtype fp32) or check the checkpoint",
            )
        made.sensitivity[name] = row
        replace_linear_(step.quantised, part, codes, shared, unit.scheme)
    set_activation_bits_(step.quantised, dict.fromkeys(group, STREAM_BITS))


def _changed_parameters(source: SourceModel, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Norms and biases that a transform may have rewritten; with R1 also embedding, final norm and head."""
    family = source.family
    changed = {}
    if not (recipe.transforms or recipe.scales_channels):
        return changed
    ends = tuple(f"{part}." for part in (family.embedding, family.final_norm, family.head))
    for name, parameter in source.model.named_parameters():
        is_weight = any(name.endswith(f"{part}.weight") for part in family.linears)
        if name.startswith(family.blocks + ".") and not is_weight:
            changed[name] = parameter.detach().float().cpu()
        elif "r1" in recipe.transforms and name.startswith(ends):
            changed[name] = parameter.detach().cpu()
    return changed


def save_prepared(workdir: Workdir, made: Prepared) -> None:
    """Keep what a resumed run needs."""
    save_codes(workdir.codes, made.codes)
    record = {
        "layers": {name: asdict(entry) for name, entry in made.layers.items()},
        "sensitivity": [asdict(row) for row in made.sensitivity.values()],
        "scales": made.scales,
    }
    write_text(workdir.folder / PREPARED, json.dumps(record))


def load_prepared_(
    source: SourceModel, workdir: Workdir, recipe: Recipe, *, device: torch.device, packed: bool = False
) -> Prepared | None:
    """What an interrupted run has prepared, if it came that far.

    ``source.model`` becomes its W4 simulation, its blocks on ``device``; what is outside them stays where it is.
    """
    record_file = workdir.folder / PREPARED
    if not (workdir.codes.exists() and record_file.exists()):
        return None
    record = json.loads(record_file.read_text(encoding="utf-8"))
    layers = {name: LayerPlan(**entry) for name, entry in record["layers"].items()}
    rows = [LayerSensitivity(**row) for row in record["sensitivity"]]
    made = Prepared(load_codes(workdir.codes), layers, {row.layer: row for row in rows}, record["scales"])
    become_simulation_(source, made.codes, made.layers, recipe.transforms, device=device, packed=packed)
    return made
