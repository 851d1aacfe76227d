"""Measure an importance matrix and write it as llama.cpp's tools read it; and take theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from halfbyte.calibration.imatrix_file import Importance, check_for, read_imatrix, write_imatrix
from halfbyte.calibration.text import cut, load_text, text_files
from halfbyte.calibration.walk import block_copy, call_block, capture
from halfbyte.core.environment import resolve_device, resolve_dtype
from halfbyte.core.guard import Touched, guarded, model_files
from halfbyte.core.progress import report
from halfbyte.models.estimate import windows_at_once
from halfbyte.models.layers import layers_of
from halfbyte.models.loading import SourceModel, find, load
from halfbyte.models.modules import blocks, is_tied, linear
from halfbyte.options import ImatrixOptions


def make_imatrix(options: ImatrixOptions) -> Importance:
    """Measure and write it.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    path = Path(options.output)
    touched = Touched(inputs=[*model_files(options.model_id), *text_files(options.calib)], outputs=[path])
    with guarded(touched, json=options.json, force=options.force):
        made = _measured(options)
        write_imatrix(path, made)
    return made


def _measured(options: ImatrixOptions) -> Importance:
    device = resolve_device(options.device)
    origin = find(options.model_id, trust_remote_code=options.trust_remote_code)
    source = load(origin, device=torch.device("cpu"), dtype=resolve_dtype(options.dtype, device))
    text = load_text(options.calib)
    ids = source.tokenizer(text.parts["calib"], add_special_tokens=False).input_ids
    count = max(1, options.calib_tokens // options.ctx)
    tokens = torch.tensor(cut(ids, options.ctx, count, spread=True, where=f"{text.name} (calib part)"))
    batch = windows_at_once(device, options.ctx)
    return measure_importance(source, tokens, device=device, batch=batch, text=text.name)


def importance_for(source: SourceModel, path: str | Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Importance of the matrices ``names`` (module paths) from a file, fp32 ``[in]``; the head only if it is there.

    Raises:
        HalfbyteError: the file cannot be read, or is of another model.
    """
    imatrix, family = read_imatrix(path), source.family
    top = {family.gguf_name(f"{part}.weight") for part in (family.embedding, family.head)}
    check_for(imatrix, {name: width for name, width in matrices(source).items() if name not in top}, where=path)
    found = {name: imatrix.values.get(family.gguf_name(f"{name}.weight")) for name in names}
    return {name: torch.from_numpy(value) for name, value in found.items() if value is not None}


def matrices(source: SourceModel) -> dict[str, int]:
    """GGUF tensor name -> input features, of every linear layer in the blocks and of the output head, in model order.

    A tied head is ``token_embd.weight``; llama.cpp's own importance matrices leave the head out.
    """
    family = source.family
    names = {f"{layer.name}.weight": layer.in_features for layer in layers_of(source.model, family)}
    names[_head_weight(source)] = linear(source.model, family.head).in_features
    return {family.gguf_name(name): width for name, width in names.items()}


def measure_importance(
    source: SourceModel,
    tokens: torch.Tensor,
    *,
    device: torch.device,
    batch: int = 1,
    text: str = "",
) -> Importance:
    """Mean of x² over all tokens, for the input x of every linear layer in the blocks and of the output head.

    One block and the hidden states of all windows are on ``device``; the model stays where it is and is not changed.

    Args:
        tokens: calibration text, int64 ``[windows, length]``.
        batch: windows at a time.
        text: name of the calibration text, kept in the result.

    Returns:
        fp32 ``[in]`` per matrix of :func:`matrices`; ``chunk_size`` is the length of a window.

    Raises:
        HalfbyteError: an activation is not finite (naming the first such matrix).
    """
    model, family = source.model, source.family
    inputs = capture(model, family, tokens, device=device, batch=batch)
    hidden, kwargs = inputs.hidden, inputs.kwargs
    walk = blocks(model, family)
    powers: dict[str, torch.Tensor] = {}
    for index, block in enumerate(walk):
        here = block if next(block.parameters()).device == device else block_copy(block, device)
        with _added_up(here, {group[0]: linear(here, group[0]).in_features for group in family.groups}) as sums:
            for part, states in enumerate(hidden):
                hidden[part] = call_block(here, states, kwargs)
        for group in family.groups:
            powers |= {f"{family.blocks}.{index}.{part}.weight": sums[group[0]] for part in group}
        report("importance", index + 1, len(walk) + 1, f"block {index}")
    norm = block_copy(model.get_submodule(family.final_norm), device)
    powers[_head_weight(source)] = torch.stack([_power(call_block(norm, states, {})) for states in hidden]).sum(dim=0)
    report("importance", len(walk) + 1, len(walk) + 1, "output head")
    count = tokens.numel()
    values = {family.gguf_name(name): (power / count).float().numpy() for name, power in powers.items()}
    return Importance(values, count, (text,) if text else (), tokens.shape[1])


def _head_weight(source: SourceModel) -> str:
    family = source.family
    return f"{family.embedding if is_tied(source.model, family) else family.head}.weight"


def _power(x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [in]
    """Sum of squares per channel, fp64 on the host: not every device has it, and batches are added up."""
    return x.flatten(0, -2).float().square().sum(dim=0).cpu().double()


@contextmanager
def _added_up(block: nn.Module, widths: Mapping[str, int]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of squares of what the linears in ``widths`` (name -> in) are given while the context is open."""
    sums = {part: torch.zeros(width, dtype=torch.float64) for part, width in widths.items()}
    handles = []
    for part in widths:

        def add(_: nn.Module, args: tuple[torch.Tensor, ...], part: str = part) -> None:
            sums[part] += _power(args[0])

        handles.append(linear(block, part).register_forward_pre_hook(add))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
