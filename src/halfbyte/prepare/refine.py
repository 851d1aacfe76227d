"""Encode the matrices of a chosen mixture of ggml types once more, for the inputs that the encoded ones before make.

Candidates are encoded for the unquantised model, so that any mixture can be put together; what a mixture does to the
inputs of later matrices is known only when it is chosen. One walk over the blocks then makes up for it, as in
:mod:`halfbyte.quant.quantisers.gptq`: what is rounded is W + β E[W (x − x̂) x̂ᵀ] H⁻¹, H that of x̂.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from halfbyte.calibration.walk import BlockStep, walk_blocks
from halfbyte.core.precision import products
from halfbyte.core.progress import report
from halfbyte.models.estimate import windows_at_once
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied, linear
from halfbyte.prepare.candidates import encode_rows, importance_of
from halfbyte.prepare.folding import fold_block_, fold_ends_, mixed_inputs
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.ggml.encoded import Encoded, save_encoded
from halfbyte.quant.ggml.gptq import Job, encode_
from halfbyte.quant.ggml.types import decode_tensor
from halfbyte.quant.int4 import check_finite
from halfbyte.quant.quantisers import InputMoments
from halfbyte.quant.quantisers.gptq import Ordered, corrected, factorised

STAGE = "refine types"


@products(exact=False)
def refine_types_(
    source: SourceModel,
    tokens: torch.Tensor,
    recipe: Recipe,
    types: Mapping[str, str],
    candidates: Encoded,
    path: Path,
    *,
    device: torch.device,
    hessian: torch.Tensor | None = None,
    imatrix: Mapping[str, torch.Tensor] | None = None,
    keep_on: torch.device | None = None,
) -> None:
    """Write the mixture to ``path``; ``source.model`` cannot be used afterwards. Blocks visit ``device`` in fp32.

    Args:
        tokens: calibration text, int64 ``[windows, length]``.
        recipe: whose transforms are folded.
        types: matrix -> ggml type.
        candidates: from which an embedding that is not the head is taken as it is.
        hessian: of what the head reads, ``[in, in]`` on ``device``; None to take the head from the candidates too.
        imatrix, keep_on: as :func:`halfbyte.prepare.candidates.encode_candidates_` takes them.

    Raises:
        HalfbyteError: values that are not finite, or that a type cannot hold, or the file cannot be written.
    """
    family = source.family
    inside = {name for name in types if name.startswith(f"{family.blocks}.")}
    rows = {(name, kind): candidates.rows(name, kind) for name, kind in types.items() if name not in inside}
    parameters = dict(candidates.extra)
    fold_ends_(source, recipe, device)
    if hessian is not None:
        name = family.embedding if is_tied(source.model, family) else family.head
        rows[name, types[name]] = _head(source, recipe, name, types[name], hessian, imatrix or {})
    batch = windows_at_once(device, tokens.shape[1])
    kind = types[family.embedding]
    table = decode_tensor(rows[family.embedding, kind], kind, source.dtype)
    copies = [nn.functional.embedding(part, table) for part in tokens.split(batch)]

    def forget(step: BlockStep) -> None:
        for part in family.linears:
            linear(step.quantised, part).weight = nn.Parameter(torch.empty(0), requires_grad=False)

    walk = walk_blocks(
        source.model, family, tokens, device=device, batch=batch, copies=copies, leave=forget, keep_on=keep_on
    )
    for step in walk:
        prefix = f"{family.blocks}.{step.index}."
        power = fold_block_(step, source, recipe).input_power
        importance = importance_of(prefix, power, imatrix or {}, device)
        step.split()
        for group in family.groups:
            for job in _encoded(step, group, prefix, types, importance.get(group[0])):
                rows[job.where, job.type] = job.rows.cpu()
                with torch.no_grad():
                    layer = linear(step.quantised, job.where.removeprefix(prefix))
                    layer.weight.copy_(decode_tensor(job.rows, job.type))
        for name, value in step.original.named_parameters():
            if name.removesuffix(".weight") not in family.linears:
                parameters[prefix + name] = value.detach().cpu()
        report(STAGE, step.index + 1, source.config.num_hidden_layers, f"block {step.index}")
    save_encoded(path, rows, parameters)


def _head(
    source: SourceModel,
    recipe: Recipe,
    name: str,
    kind: str,
    hessian: torch.Tensor,
    imatrix: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Encoded rows of the matrix that answers, for what it reads in the unquantised model."""
    measured = hessian.diagonal().clone()
    known = factorised(Ordered(hessian))
    importance = measured if name in mixed_inputs(source.family, recipe) else imatrix.get(name, measured)
    weight = linear(source.model, name).weight
    return encode_rows(weight, [kind], importance.to(measured.device), known, where=name)[kind][0]


def _encoded(
    step: BlockStep,
    group: tuple[str, ...],
    prefix: str,
    types: Mapping[str, str],
    importance: torch.Tensor | None,
) -> list[Job]:
    """The matrices of a block that share their input, encoded for what the copy gives them."""
    weights = [linear(step.original, part).weight.detach().float() for part in group]
    moments = InputMoments(torch.cat(weights))
    for original, of_copy, _ in step.inputs(group[0]):
        moments.add(original, of_copy)
    del step.seen[group[0]]
    measured = moments.hessian.diagonal().clone()
    check_finite(measured, prefix + group[0], "activations are")
    known = factorised(Ordered(moments.take_hessian()))
    parts = corrected(moments, known).split([len(weight) for weight in weights])
    names = [prefix + part for part in group]
    jobs = [Job(rows.contiguous(), types[name], name) for name, rows in zip(names, parts, strict=True)]
    encode_(jobs, measured if importance is None else importance, known, plain=False)
    return jobs
