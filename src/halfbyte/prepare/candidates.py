"""Every matrix of a model in every type of its menu, and how much output error that makes.

Which types a matrix may have is decided before anything is measured. The model stays unquantised: transforms are folded
into it in place, block by block on the device, and each matrix is encoded for the inputs of the unquantised model, so
that any mixture of types can be put together afterwards. If the chosen mixture is to be encoded once more
(:mod:`halfbyte.prepare.refine`), rounding is enough here: it ranks mixtures as GPTQ does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from halfbyte.calibration.walk import BlockStep, walk_blocks
from halfbyte.core.distributed import ALONE, Group
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.precision import products
from halfbyte.core.progress import report
from halfbyte.models.estimate import windows_at_once
from halfbyte.models.families import Family
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied, linear
from halfbyte.prepare.folding import fold_block_, fold_ends_, mixed_inputs
from halfbyte.prepare.parts import Errors, PartWriter, Rows, write_part
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.ggml.encoded import Encoded, save_tensors
from halfbyte.quant.ggml.gptq import Job, encode_
from halfbyte.quant.ggml.inputs import error_of_rounding, rounding_powers
from halfbyte.quant.ggml.types import bits_per_weight, fits, row_bytes
from halfbyte.quant.int4 import check_finite
from halfbyte.quant.quantisers.gptq import Ordered, factorised
from halfbyte.workdir import read_kept

TOP_ROWS = 8192  # of embedding and head, encoded at once
STAGE = "encode candidates"
HESSIAN = "head-hessian"
OUTSIDE = -1  # block of the embedding and the head

# Types with even grids, whose codes can be chosen with feedback, and which run fast everywhere. The first row is for
# rows of whole 256-blocks; where two types need the same bits, the one with less error at that size.
LARGE = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
SMALL_BLOCKS = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Below LOW_BITS also types that are slow to encode and on CPUs slow to run.
LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S")
LOW_BITS = 4.0
NEAR = (0.6, 2.0)  # of the mean: smaller or larger types are left out


@dataclass(frozen=True)
class TensorMenu:
    """A matrix of the model and what it may become.

    Attributes:
        name: module path, e.g. ``model.layers.3.mlp.down_proj`` or ``model.embed_tokens``.
        block: index of its block, or ``OUTSIDE``.
        rows, columns: the weight is ``[rows, columns]``.
        types: ggml types by rising size.
    """

    name: str
    block: int
    rows: int
    columns: int
    types: tuple[str, ...]

    def nbytes(self, type_name: str) -> int:
        """Encoded size."""
        return self.rows * row_bytes(self.columns, type_name, where=self.name)


def menus_of(source: SourceModel, mean_bits: float, types: tuple[str, ...] = ()) -> list[TensorMenu]:
    """The matrices in the order of the model, embedding first and an untied head last.

    Args:
        mean_bits: bits per weight that the file has room for; types far from it are left out.
        types: offer these instead.

    Raises:
        HalfbyteError: a matrix cannot hold any of the types.
    """
    family, model = source.family, source.model
    places = [(family.embedding, OUTSIDE)]
    for block in range(source.config.num_hidden_layers):
        places += [(f"{family.blocks}.{block}.{part}", block) for part in family.linears]
    if not is_tied(model, family):
        places.append((family.head, OUTSIDE))
    found = []
    for name, block in places:
        rows, columns = linear(model, name).weight.shape
        found.append(TensorMenu(name, block, rows, columns, _types(columns, mean_bits, types, where=name)))
    return found


def _types(columns: int, mean_bits: float, asked: tuple[str, ...], *, where: str) -> tuple[str, ...]:
    offered = asked or LARGE + SMALL_BLOCKS + (LOW if mean_bits < LOW_BITS else ())
    legal = [name for name in offered if fits(columns, name)]
    if not asked and any(fits(columns, name) for name in LARGE[:-1]):
        legal = [name for name in legal if name not in SMALL_BLOCKS[:-1]]
    if not asked:
        low, high = (share * mean_bits for share in NEAR)
        near = [name for name in legal if low <= bits_per_weight(name) <= high]
        legal = near or legal or ["F16"]
    if not legal:
        raise HalfbyteError(
            f"{where}: no type fits, expected a row of whole blocks, got {columns} columns",
            fix="offer Q8_0, Q5_0, IQ4_NL or F16 too",
        )
    return tuple(sorted(dict.fromkeys(legal), key=bits_per_weight))


@dataclass
class Candidates:
    """What :func:`encode_candidates_` leaves.

    Attributes:
        encoded: the encoded matrices, in files.
        errors: matrix -> type -> squared output error per token, that of llama.cpp's rounding of inputs included; of
            rounded matrices as if channels were independent, of an embedding that is not the head squared error.
    """

    encoded: Encoded = field(default_factory=Encoded)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, folder: Path, stem: str) -> None:
        """Map what was written for one part of the model."""
        self.encoded.add(folder / f"{stem}.safetensors")
        self.errors |= json.loads(read_kept(folder / f"{stem}.json") or "{}")


@products(exact=False)
def encode_candidates_(
    source: SourceModel,
    tokens: torch.Tensor,
    recipe: Recipe,
    menus: Sequence[TensorMenu],
    folder: Path,
    *,
    device: torch.device,
    rounded: bool = False,
    imatrix: Mapping[str, torch.Tensor] | None = None,
    keep_on: torch.device | None = None,
    group: Group = ALONE,
) -> Candidates:
    """Fold the recipe's transforms into ``source.model``, in place, and encode its matrices into ``folder``.

    Parts that are in the folder already are not encoded again. Blocks visit ``device`` one at a time, in fp32. The
    tensor of the output head is not written to: with R1 the head becomes another one.

    Args:
        tokens: calibration text, int64 ``[windows, length]``.
        menus: see :func:`menus_of`.
        rounded: codes are rounded, on scales of the least weighted error; the Hessian of what the output head reads is
            left in the folder, for :func:`head_hessian`.
        imatrix: matrix -> importance of its input channels in the model as it is, fp32 ``[in]``, to choose scales by
            in place of what is measured; not for inputs that a rotation has mixed.
        keep_on: where calibration activations are kept, by default on ``device``.
        group: processes that see the same folder; each encodes its share of the blocks.

    Raises:
        HalfbyteError: values that are not finite, or that a type cannot hold.
    """
    family, made = source.family, Candidates()
    own_blocks = group.share(range(source.config.num_hidden_layers))
    batch = windows_at_once(device, tokens.shape[1])
    last: list[torch.Tensor] = []

    def leave(step: BlockStep) -> None:
        last[:] = step.outputs

    fold_ends_(source, recipe, device)
    mixed = mixed_inputs(family, recipe)
    imatrix = imatrix or {}
    if imatrix and mixed:
        report("importance matrix", 1, 1, f"measured for {', '.join(mixed)}: their inputs are rotated")
    with PartWriter(folder) as writer:
        for step in walk_blocks(source.model, family, tokens, device=device, batch=batch, leave=leave, keep_on=keep_on):
            input_power = fold_block_(step, source, recipe).input_power
            stem = part_name(step.index)
            if step.index in own_blocks and read_kept(folder / f"{stem}.json") is None:
                own = {menu.name: menu for menu in menus if menu.block == step.index}
                importance = importance_of(f"{family.blocks}.{step.index}.", input_power, imatrix, device)
                writer.write(stem, *_encoded_block(step, family, own, recipe, importance, rounded=rounded))
            report(STAGE, step.index + 1, source.config.num_hidden_layers + 1, stem)
    outside = [menu for menu in menus if menu.block == OUTSIDE]
    if group.first and any(read_kept(folder / f"{menu.name}.json") is None for menu in outside):
        importance = {name: value for name, value in imatrix.items() if name not in mixed}
        plain = not recipe.quantiser.looks_at_inputs
        _encode_top(source, outside, last, importance, folder, device, plain=plain, rounded=rounded)
    group.merge([None])  # when all have written
    for part in (*map(part_name, range(source.config.num_hidden_layers)), *(menu.name for menu in outside)):
        made.add(folder, part)
    report(STAGE, 1, 1, f"{len(menus)} matrices, {sum(len(menu.types) for menu in menus)} candidates")
    return made


def importance_of(
    prefix: str, input_power: Mapping[str, torch.Tensor], imatrix: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """Linear -> importance of its input channels ``[in]`` after folding, on ``device``; of those in the imatrix.

    Args:
        prefix: of the block.
        input_power: see :class:`halfbyte.prepare.folding.Folded`.
        imatrix: matrix -> importance in the model as it is.
    """
    known = {part: imatrix[prefix + part] for part in input_power if prefix + part in imatrix}
    return {part: input_power[part].to(device) * measured.to(device) for part, measured in known.items()}


def part_name(block: int) -> str:
    """Of the files of a block."""
    return f"block-{block:03d}"


def part_files(folder: Path, menus: Sequence[TensorMenu]) -> list[Path]:
    """Everything that is written for these matrices; the JSON of a part comes last."""
    stems = dict.fromkeys(menu.name if menu.block == OUTSIDE else part_name(menu.block) for menu in menus)
    return [folder / f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".json")]


def _encoded_block(
    step: BlockStep,
    family: Family,
    menus: dict[str, TensorMenu],
    recipe: Recipe,
    importance: Mapping[str, torch.Tensor],  # linear -> [in], where it is not to be measured
    *,
    rounded: bool,
) -> tuple[Rows, dict[str, torch.Tensor], Errors]:
    """What a block becomes, and its other parameters, in main memory."""
    rows: Rows = {}
    errors: Errors = {}
    for group in family.groups:
        name = f"{family.blocks}.{step.index}.{group[0]}"
        own = [menus[f"{family.blocks}.{step.index}.{part}"] for part in group]
        weights = [linear(step.original, part).weight.float() for part in group]
        seen, known = step.seen.pop(group[0]), None
        changed = rounding_powers(seen, {kind for menu in own for kind in menu.types}, weights[0].device)
        if rounded:
            measured = power_of(seen, name, weights[0].device)
        else:
            known, measured = hessian_of(seen, name, weights[0].device)
        del seen
        jobs = [Job(weight, kind, menu.name) for menu, weight in zip(own, weights, strict=True) for kind in menu.types]
        encode_(jobs, importance.get(group[0], measured), known, plain=not recipe.quantiser.looks_at_inputs)
        for job in jobs:
            rows[job.where, job.type] = job.rows.cpu()
            errors.setdefault(job.where, {})[job.type] = float(
                job.error.sum() + error_of_rounding(job.weight, job.type, changed)
            )
    parameters = {
        f"{family.blocks}.{step.index}.{name}": value.detach().cpu()
        for name, value in step.original.named_parameters()
        if name.removesuffix(".weight") not in family.linears
    }
    return rows, parameters, errors


def _encode_top(
    source: SourceModel,
    menus: Sequence[TensorMenu],
    hidden: Sequence[torch.Tensor],
    importance: Mapping[str, torch.Tensor],
    folder: Path,
    device: torch.device,
    *,
    plain: bool,
    rounded: bool,
) -> None:
    """Embedding and output head; a head that is tied is the embedding, and encoded for what it reads."""
    model, family = source.model, source.family
    norm = model.get_submodule(family.final_norm)
    with torch.no_grad():
        final = [norm.to(device)(states.to(device, source.dtype)).float().flatten(0, 1) for states in hidden]
    norm.to(source.device)
    hessian = mean_square(final, family.head, device)
    changed = rounding_powers(final, {kind for menu in menus for kind in menu.types}, device)
    del final
    measured = hessian.diagonal().clone()
    if rounded:
        save_tensors(folder / f"{HESSIAN}.safetensors", {HESSIAN: hessian}, HESSIAN)
    known = None if rounded else factorised(Ordered(hessian))
    del hessian
    parameters = {f"{family.final_norm}.{name}": value for name, value in norm.named_parameters()}  # R1 makes it plain
    for menu in menus:
        is_read = menu.name == family.head or is_tied(model, family)
        columns = importance.get(menu.name, measured).to(device) if is_read else torch.ones_like(measured)
        weight = linear(model, menu.name).weight
        made = encode_rows(weight, menu.types, columns, known if is_read else None, where=menu.name, plain=plain)
        added = {kind: error_of_rounding(weight, kind, changed) if is_read else 0.0 for kind in menu.types}
        rows = {(menu.name, kind): rows for kind, (rows, _) in made.items()}
        totals = {kind: error + float(added[kind]) for kind, (_, error) in made.items()}
        write_part(folder, menu.name, rows, parameters if is_read else {}, {menu.name: totals})


def encode_rows(
    weight: torch.Tensor,
    types: Sequence[str],
    importance: torch.Tensor,
    known: Ordered | None,
    *,
    where: str,
    plain: bool = False,
) -> dict[str, tuple[torch.Tensor, float]]:
    """A matrix ``[out, in]`` that is too large to be encoded at once: type -> encoded rows on the host, error.

    The other arguments are those of :func:`halfbyte.quant.ggml.gptq.encode_`, on whose device it is done.
    """
    parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in types}
    errors = dict.fromkeys(types, 0.0)
    for part in weight.split(TOP_ROWS):
        jobs = [Job(part.to(importance.device).float(), kind, where) for kind in types]
        encode_(jobs, importance, known, plain=plain)
        for job in jobs:
            parts[job.type].append(job.rows.cpu())
            errors[job.type] += float(job.error.sum())
    return {kind: (torch.cat(rows), errors[kind]) for kind, rows in parts.items()}


def head_hessian(folder: Path, device: torch.device) -> torch.Tensor | None:
    """Of what the head reads in the unquantised model, ``[in, in]`` on ``device``; None where it is encoded by that."""
    path = folder / f"{HESSIAN}.safetensors"
    return load_file(path, device=str(device))[HESSIAN] if path.exists() else None


def power_of(batches: Sequence[torch.Tensor], where: str, device: torch.device) -> torch.Tensor:
    """Mean square ``[in]`` over ``batches`` of ``[tokens, in]``, on ``device``.

    Raises:
        HalfbyteError: activations are not finite.
    """
    power = torch.stack([batch.to(device).square().sum(0) for batch in batches]).sum(0)
    power /= sum(len(batch) for batch in batches)
    check_finite(power, where, "activations are")
    return power


def hessian_of(
    batches: Sequence[torch.Tensor], where: str, device: torch.device | None = None
) -> tuple[Ordered, torch.Tensor]:
    """Mean of x xᵀ over ``batches`` of ``[tokens, in]``, factorised, and its diagonal ``[in]``, on ``device``.

    Inputs that are all zero have no Hessian; the identity stands for it, so that nothing is gained or lost by feedback.

    Raises:
        HalfbyteError: activations are not finite.
    """
    hessian = mean_square(batches, where, device)
    importance = hessian.diagonal().clone()
    ordered = Ordered(hessian)
    del hessian  # 1.4 GB for 18,944 channels
    return factorised(ordered), importance


def mean_square(batches: Sequence[torch.Tensor], where: str, device: torch.device | None) -> torch.Tensor:
    """Mean of x xᵀ over ``batches`` of ``[tokens, in]``, ``[in, in]`` on ``device``.

    Raises:
        HalfbyteError: activations are not finite.
    """
    count, width = sum(len(batch) for batch in batches), batches[0].shape[1]
    hessian = batches[0].new_zeros(width, width, device=device)
    for batch in (batch.to(hessian.device) for batch in batches):
        hessian.addmm_(batch.T, batch, alpha=1 / count)
    check_finite(hessian.diagonal(), where, "activations are")
    return hessian
