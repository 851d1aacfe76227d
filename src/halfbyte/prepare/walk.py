"""Turn a loaded model into its W4 simulation, block by block, and keep the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

from halfbyte.calibration.walk import BlockStep, walk_blocks
from halfbyte.core.distributed import ALONE, Group
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.precision import products
from halfbyte.core.progress import report
from halfbyte.models.checkpoint import CheckpointCodes
from halfbyte.models.estimate import windows_at_once
from halfbyte.models.layers import layers_of
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import linear
from halfbyte.plan import Codes, LayerPlan, load_codes, save_codes
from halfbyte.prepare.checkpoint import check_same_model, original_answers, take_block_, take_ends_
from halfbyte.prepare.folding import changed_ends, fold_block_, fold_ends_
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.simulation import become_simulation_
from halfbyte.prepare.token_weights import token_weights
from halfbyte.prepare.units import QuantisedUnit, quantise_unit
from halfbyte.quant.int4 import GroupedWeight, check_packable
from halfbyte.quant.quant_linear import SharedInput, pack_linear_, replace_linear_, set_activation_bits_
from halfbyte.search.sensitivity import LayerSensitivity
from halfbyte.workdir import Workdir, read_kept, write_kept

PREPARED = "prepared.json"
STAGE = "transforms and W4 codes"


@dataclass
class Prepared:
    """What preparation leaves.

    Attributes:
        codes: for the plan's codes file.
        layers: layer name -> its entry in the plan, with the most activation bits until a search decides.
        sensitivity: layer name -> measured errors.
        scales: unit (its first layer's name) -> which channel scales were chosen.
    """

    codes: Codes
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    sensitivity: dict[str, LayerSensitivity] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)


@products(exact=False)
def prepare_(
    source: SourceModel,
    tokens: torch.Tensor,
    recipe: Recipe,
    *,
    device: torch.device,
    packed: bool = False,
    checkpoint: CheckpointCodes | None = None,
    seed: int = 0,
    keep_on: torch.device | None = None,
    group: Group = ALONE,
) -> Prepared:
    """Transform and quantise ``source.model`` in place; it becomes its W4 simulation, where it was.

    Blocks visit ``device`` one at a time, in fp32.

    With a checkpoint the model becomes that one, and there is no unquantised layer in its coordinates: the errors of a
    layer are then those of rounding its input, against the checkpoint's own layer on the unrounded one.

    Args:
        tokens: calibration text, int64 ``[windows, length]``.
        packed: blocks that are done keep their codes packed: on the host the same tensors as in the result.
        checkpoint: codes and other parameters that are taken over; the recipe then has no transforms.
        seed: of what :func:`halfbyte.prepare.token_weights.token_weights` draws.
        keep_on: where hidden states and inputs of layers are kept, by default on ``device``.
        group: processes that share the work, at most as many as there are batches (:func:`batches_of`); all of them get
            the whole result. Without a checkpoint.

    Raises:
        HalfbyteError: values that are not finite, or codes that cannot be packed, with the layer's name; or a
            checkpoint of another model.
    """
    family, model = source.family, source.model
    for layer in layers_of(model, family):
        check_packable(layer.in_features, where=layer.name)
    expected = original_answers(source, tokens, device=device) if checkpoint is not None else None
    weighed = recipe.quantiser.looks_at_inputs and checkpoint is None
    tokens = torch.cat(tuple(group.share(batches_of(tokens, device))))
    counts = token_weights(source, tokens, device=device, seed=seed, group=group) if weighed else {}
    if checkpoint is None:
        fold_ends_(source, recipe, device)
    else:
        take_ends_(source, checkpoint)
    work = _Preparation(source, recipe, checkpoint, counts)
    outputs = tokens
    leave = work.pack_ if packed else None
    batch = windows_at_once(device, tokens.shape[1])
    walk = walk_blocks(model, family, tokens, device=device, batch=batch, leave=leave, keep_on=keep_on, group=group)
    for step in walk:
        work.block_(step)
        outputs = step.outputs[0]
        report(STAGE, step.index + 1, source.config.num_hidden_layers, f"block {step.index}")
    made = work.made
    set_activation_bits_(model, dict.fromkeys(made.layers, None))
    if checkpoint is None or expected is None:
        made.codes = replace(made.codes, parameters=_changed_parameters(source, recipe))
        return made
    check_same_model(source, expected, outputs, device=device, where=checkpoint.folder.path)
    made.codes = replace(made.codes, parameters=checkpoint.parameters)
    for name, entry in made.layers.items():
        made.layers[name] = replace(entry, note=checkpoint.note(name, recipe.group_size))
    return made


def batches_of(tokens: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Calibration text ``[windows, length]`` as it goes through a block."""
    return tokens.split(windows_at_once(device, tokens.shape[1]))


class _Preparation:
    """What is done to each block, and what was made of those before."""

    def __init__(
        self,
        source: SourceModel,
        recipe: Recipe,
        checkpoint: CheckpointCodes | None,
        counts: Mapping[str, torch.Tensor],
    ) -> None:
        self.source, self.recipe, self.checkpoint, self.counts = source, recipe, checkpoint, counts
        self.made = Prepared(Codes({}, {}, {}))
        self._shared = SharedInput()

    def block_(self, step: BlockStep) -> None:
        """Fold, then quantise unit by unit."""
        taken = {} if self.checkpoint is None else take_block_(step, self.source, self.checkpoint)
        folded = fold_block_(step, self.source, self.recipe)
        prefix = f"{self.source.family.blocks}.{step.index}."
        self.made.scales |= {prefix + part: chosen for part, chosen in folded.scales.items()}
        for part, scales in folded.channel_scales.items():
            self.made.codes.channel_scales[prefix + part] = scales
        if self.checkpoint is None:  # otherwise nothing depends on what quantised blocks make, and no copy is needed
            step.split()
        for group, scheme in folded.schemes.items():
            codes, where = {part: taken[part] for part in group if taken}, prefix + group[0]
            counts = self.counts.get(where)
            unit = quantise_unit(step, group, self.recipe, scheme, where=where, codes=codes, token_weights=counts)
            self._keep_(step, prefix, unit)

    def _keep_(self, step: BlockStep, prefix: str, unit: QuantisedUnit) -> None:
        """Note what became of a unit, and put it into the copy."""
        low_rank = unit.scheme.low_rank
        if low_rank is not None:
            self.made.codes.low_rank[prefix + next(iter(unit.codes))] = low_rank.to("cpu")
        for part, codes in unit.codes.items():
            name = prefix + part
            self.made.codes.weights[name] = codes.pack().to("cpu")
            self.made.layers[name] = _entry(unit, codes, self.recipe)
            self.made.sensitivity[name] = _sensitivity(name, unit.errors[part])
            replace_linear_(step.quantised, part, codes, self._shared, unit.scheme)
            if step.quantised is not step.original:  # which nothing reads any more: room for the next unit
                linear(step.original, part).weight = nn.Parameter(codes.scales.new_empty(0), requires_grad=False)
        set_activation_bits_(step.quantised, dict.fromkeys(unit.codes, self.recipe.stream_bits))

    def pack_(self, step: BlockStep) -> None:
        """Let the block's layers keep the packed codes that are kept for the result."""
        for part in self.source.family.linears:
            name = f"{self.source.family.blocks}.{step.index}.{part}"
            pack_linear_(step.quantised, part, self.made.codes.weights[name])


def _entry(unit: QuantisedUnit, codes: GroupedWeight, recipe: Recipe) -> LayerPlan:
    """A layer's entry in the plan."""
    notes = [unit.note] if unit.note else []
    if codes.group_size != recipe.group_size:
        notes.append(f"group {codes.group_size}: {recipe.group_size} does not divide {codes.shape[1]}")
    return LayerPlan(
        w_bits=codes.bits,
        a_bits=recipe.a_bits[-1],
        group_size=codes.group_size,
        a_symmetric=unit.scheme.symmetric,
        note="; ".join(notes),
        a4_clip=unit.scheme.a4_clip,
        rotated=unit.scheme.rotated,
        rank=unit.scheme.low_rank.rank if unit.scheme.low_rank else 0,
        rotation_block=unit.scheme.block,
        arithmetic=unit.scheme.arithmetic,
        a_group=unit.scheme.group,
        a_scale=unit.scheme.scale,
    )


def _sensitivity(layer: str, errors: tuple[float, float, float]) -> LayerSensitivity:
    if not all(value < float("inf") for value in errors):
        raise HalfbyteError(
            f"{layer}: activations are not finite, got NaN or Inf during calibration",
            fix="compute in fp32 (--dtype fp32) or check the checkpoint",
        )
    return LayerSensitivity(layer, *errors)


def _changed_parameters(source: SourceModel, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Norms and biases of blocks that a transform may have rewritten, and what is changed outside of them."""
    family = source.family
    changed = {}
    if not recipe.applied:
        return changed
    ends = tuple(f"{part}." for part in changed_ends(family, recipe))
    for name, parameter in source.model.named_parameters():
        is_weight = any(name.endswith(f"{part}.weight") for part in family.linears)
        if name.startswith(family.blocks + ".") and not is_weight:
            changed[name] = parameter.detach().float().cpu()
        elif name.startswith(ends):
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
    write_kept(workdir.folder / PREPARED, json.dumps(record))


def load_prepared_(
    source: SourceModel, workdir: Workdir, recipe: Recipe, *, device: torch.device, packed: bool = False
) -> Prepared | None:
    """What an interrupted run has prepared, if it came that far.

    ``source.model`` becomes its W4 simulation, its blocks on ``device``; what is outside them stays where it is.
    """
    text = read_kept(workdir.folder / PREPARED)
    if text is None or not workdir.codes.exists():
        return None
    record = json.loads(text)
    layers = {name: LayerPlan(**entry) for name, entry in record["layers"].items()}
    rows = [LayerSensitivity(**row) for row in record["sensitivity"]]
    made = Prepared(load_codes(workdir.codes), layers, {row.layer: row for row in rows}, record["scales"])
    become_simulation_(source, made.codes, made.layers, device=device, packed=packed)
    return made
