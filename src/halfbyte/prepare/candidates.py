"""Every matrix of a model in every type of its menu, and how much output error that makes.

The model stays unquantised: transforms are folded into it in place, block by block on the device, and each matrix is
encoded for the inputs of the unquantised model, so that any mixture of types can be put together afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from halfbyte.calibration.walk import BlockStep, walk_blocks
from halfbyte.core.files import write_text
from halfbyte.core.progress import report
from halfbyte.models.families import Family
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied, linear
from halfbyte.prepare.folding import fold_block_, fold_ends_, mixed_inputs
from halfbyte.prepare.menus import OUTSIDE, TensorMenu
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.ggml.encoded import Encoded, save_encoded
from halfbyte.quant.ggml.gptq import Job, encode_
from halfbyte.quant.int4 import check_finite
from halfbyte.quant.quantisers.gptq import DAMPING, NotPositive, Ordered

BATCH_TOKENS = 4096  # that go through a block at once on an accelerator
TOP_ROWS = 8192  # of embedding and head, encoded at once
STAGE = "encode candidates"


@dataclass
class Candidates:
    """What :func:`encode_candidates_` leaves.

    Attributes:
        encoded: the encoded matrices, in files.
        errors: matrix -> type -> squared output error per token; of an embedding that is not the head, squared error.
    """

    encoded: Encoded = field(default_factory=Encoded)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, folder: Path, stem: str) -> None:
        """Map what was written for one part of the model."""
        self.encoded.add(folder / f"{stem}.safetensors")
        self.errors |= json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))


def encode_candidates_(
    source: SourceModel,
    tokens: torch.Tensor,
    recipe: Recipe,
    menus: Sequence[TensorMenu],
    folder: Path,
    *,
    device: torch.device,
    imatrix: Mapping[str, torch.Tensor] | None = None,
    keep_on: torch.device | None = None,
) -> Candidates:
    """Fold the recipe's transforms into ``source.model``, in place, and encode its matrices into ``folder``.

    Parts that are in the folder already are not encoded again. Blocks visit ``device`` one at a time, in fp32. The
    tensor of the output head is not written to: with R1 the head becomes another one.

    Args:
        tokens: calibration text, int64 ``[windows, length]``.
        menus: see :func:`halfbyte.prepare.menus.menus_of`.
        imatrix: matrix -> importance of its input channels in the model as it is, fp32 ``[in]``, to choose scales by
            in place of what is measured; not for inputs that a rotation has mixed.
        keep_on: where calibration activations are kept, by default on ``device``.

    Raises:
        HalfbyteError: values that are not finite, or that a type cannot hold.
    """
    family, made = source.family, Candidates()
    batch = 1 if device.type == "cpu" else max(1, BATCH_TOKENS // tokens.shape[1])
    last: list[torch.Tensor] = []

    def leave(step: BlockStep) -> None:
        last[:] = step.outputs

    fold_ends_(source, recipe, device)
    mixed = mixed_inputs(family, recipe)
    imatrix = imatrix or {}
    if imatrix and mixed:
        report("importance matrix", 1, 1, f"measured for {', '.join(mixed)}: their inputs are rotated")
    for step in walk_blocks(source.model, family, tokens, device=device, batch=batch, leave=leave, keep_on=keep_on):
        input_power = fold_block_(step, source, recipe).input_power
        stem = part_name(step.index)
        if not (folder / f"{stem}.json").exists():
            own = {menu.name: menu for menu in menus if menu.block == step.index}
            importance = {}
            for part, power in input_power.items():
                measured = imatrix.get(f"{family.blocks}.{step.index}.{part}")
                if measured is not None:
                    importance[part] = (power * measured.to(power.device)).to(device)
            _encode_block(step, family, own, recipe, importance, folder, stem)
        made.add(folder, stem)
        report(STAGE, step.index + 1, source.config.num_hidden_layers + 1, stem)
    outside = [menu for menu in menus if menu.block == OUTSIDE]
    if not all((folder / f"{menu.name}.json").exists() for menu in outside):
        importance = {name: value for name, value in imatrix.items() if name not in mixed}
        _encode_top(source, outside, last, importance, folder, device, plain=not recipe.quantiser.looks_at_inputs)
    for menu in outside:
        made.add(folder, menu.name)
    report(STAGE, 1, 1, f"{len(menus)} matrices, {sum(len(menu.types) for menu in menus)} candidates")
    return made


def part_name(block: int) -> str:
    """Of the files of a block."""
    return f"block-{block:03d}"


def part_files(folder: Path, menus: Sequence[TensorMenu]) -> list[Path]:
    """Everything that is written for these matrices; the JSON of a part comes last."""
    stems = dict.fromkeys(menu.name if menu.block == OUTSIDE else part_name(menu.block) for menu in menus)
    return [folder / f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".json")]


def _encode_block(
    step: BlockStep,
    family: Family,
    menus: dict[str, TensorMenu],
    recipe: Recipe,
    importance: Mapping[str, torch.Tensor],  # linear -> [in], where it is not to be measured
    folder: Path,
    stem: str,
) -> None:
    rows: dict[tuple[str, str], torch.Tensor] = {}
    errors: dict[str, dict[str, float]] = {}
    for group in family.groups:
        name = f"{family.blocks}.{step.index}.{group[0]}"
        own = [menus[f"{family.blocks}.{step.index}.{part}"] for part in group]
        weights = [linear(step.original, part).weight.float() for part in group]
        hessian, measured = hessian_of(step.seen.pop(group[0]), name, weights[0].device)
        jobs = [Job(weight, kind, menu.name) for menu, weight in zip(own, weights, strict=True) for kind in menu.types]
        encode_(jobs, importance.get(group[0], measured), hessian, plain=not recipe.quantiser.looks_at_inputs)
        for job in jobs:
            rows[job.where, job.type] = job.rows.cpu()
            errors.setdefault(job.where, {})[job.type] = float(job.error.sum())
    parameters = {
        f"{family.blocks}.{step.index}.{name}": value
        for name, value in step.original.named_parameters()
        if name.removesuffix(".weight") not in family.linears
    }
    save_encoded(folder / f"{stem}.safetensors", rows, parameters)
    write_text(folder / f"{stem}.json", json.dumps(errors))


def _encode_top(
    source: SourceModel,
    menus: Sequence[TensorMenu],
    hidden: Sequence[torch.Tensor],
    importance: Mapping[str, torch.Tensor],
    folder: Path,
    device: torch.device,
    *,
    plain: bool,
) -> None:
    """Embedding and output head; a head that is tied is the embedding, and encoded for what it reads."""
    model, family = source.model, source.family
    norm = model.get_submodule(family.final_norm)
    with torch.no_grad():
        final = [norm.to(device)(states.to(device, source.dtype)).float().flatten(0, 1) for states in hidden]
    norm.to(source.device)
    hessian, measured = hessian_of(final, family.head, device)
    del final
    parameters = {f"{family.final_norm}.{name}": value for name, value in norm.named_parameters()}  # R1 makes it plain
    for menu in menus:
        is_read = menu.name == family.head or is_tied(model, family)
        columns = importance.get(menu.name, measured) if is_read else torch.ones_like(measured)
        size = {kind: menu.nbytes(kind) // menu.rows for kind in menu.types}
        rows = {(menu.name, kind): torch.empty(menu.rows, size[kind], dtype=torch.uint8) for kind in menu.types}
        totals = dict.fromkeys(menu.types, 0.0)
        start = 0
        for weight in linear(model, menu.name).weight.split(TOP_ROWS):
            jobs = [Job(weight.to(device).float(), kind, menu.name) for kind in menu.types]
            encode_(jobs, columns, hessian if is_read else None, plain=plain)
            for job in jobs:
                rows[menu.name, job.type][start : start + len(weight)] = job.rows.cpu()
                totals[job.type] += float(job.error.sum())
            start += len(weight)
        save_encoded(folder / f"{menu.name}.safetensors", rows, parameters if is_read else {})
        write_text(folder / f"{menu.name}.json", json.dumps({menu.name: totals}))


def hessian_of(
    batches: Sequence[torch.Tensor], where: str, device: torch.device | None = None
) -> tuple[Ordered, torch.Tensor]:
    """Mean of x xᵀ over ``batches`` of ``[tokens, in]``, factorised, and its diagonal ``[in]``, on ``device``.

    Inputs that are all zero have no Hessian; the identity stands for it, so that nothing is gained or lost by feedback.

    Raises:
        HalfbyteError: activations are not finite.
    """
    count, width = sum(len(batch) for batch in batches), batches[0].shape[1]
    hessian = batches[0].new_zeros(width, width, device=device)
    for batch in (batch.to(hessian.device) for batch in batches):
        hessian.addmm_(batch.T, batch, alpha=1 / count)
    importance = hessian.diagonal().clone()
    check_finite(importance, where, "activations are")
    ordered = Ordered(hessian)
    del hessian  # 1.4 GB for 18,944 channels
    for damping in DAMPING:
        try:
            ordered.factorise(damping)
        except NotPositive:
            continue
        return ordered, importance
    ordered = Ordered(torch.eye(width, device=importance.device))
    ordered.factorise(0.0)
    return ordered, importance
