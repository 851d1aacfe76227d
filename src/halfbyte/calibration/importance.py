"""Measure an importance matrix: the mean squared input of every linear layer, one block at a time on the device.

It is what llama.cpp's imatrix tool measures (``tools/imatrix``), on the model before it became a GGUF file. The order
of input channels is the same in both: only rows of q and k are reordered for llama.cpp's rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from halfbyte.calibration.blocks import block_copy, call_block, capture
from halfbyte.formats.imatrix import Importance
from halfbyte.models.loading import SourceModel, layers_of
from halfbyte.models.modules import blocks, is_tied, linear
from halfbyte.progress import Progress, Reporter, silent


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
    report: Reporter = silent,
) -> Importance:
    """Mean of x² over all tokens, for the input x of every linear layer in the blocks and of the output head.

    One block and the hidden states of all windows are on ``device``; the model stays where it is and is not changed.

    Args:
        tokens: calibration text, int64 ``[windows, length]``.
        batch: windows at a time.
        text: name of the calibration text, kept in the result.
        report: told about every block and the head, stage ``importance``.

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
        report(Progress("importance", index + 1, len(walk) + 1, f"block {index}"))
    norm = block_copy(model.get_submodule(family.final_norm), device)
    powers[_head_weight(source)] = torch.stack([_power(call_block(norm, states, {})) for states in hidden]).sum(dim=0)
    report(Progress("importance", len(walk) + 1, len(walk) + 1, "output head"))
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
