"""Take over what a quantised checkpoint brings along (``--weights_from``): codes and all other parameters, as they are.

Whatever was folded into the checkpoint, it is a model of its own; nothing of it is compared with the original, except
what both say in the end.
"""

from __future__ import annotations

import torch

from halfbyte.calibration.walk import BlockStep, block_copy, call_block, run_blocks
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.precision import products
from halfbyte.models.checkpoint import CheckpointCodes
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import linear
from halfbyte.quant.int4 import GroupedWeight
from halfbyte.quant.quant_linear import set_parameters_

CHECKED_TOKENS = 128  # on which checkpoint and original are compared
LARGEST_KL = 2.0  # nats per token; int4 weights lose 0.01 to 0.5, another model several


def take_ends_(source: SourceModel, checkpoint: CheckpointCodes) -> None:
    """Give the model the checkpoint's embedding, final norm and head, in place."""
    inside = f"{source.family.blocks}."
    ends = {name: value for name, value in checkpoint.parameters.items() if not name.startswith(inside)}
    set_parameters_(source.model, ends)


def take_block_(step: BlockStep, source: SourceModel, checkpoint: CheckpointCodes) -> dict[str, GroupedWeight]:
    """Turn the step's block into the checkpoint's, in place: norms, biases, and weights as the codes decode.

    Returns:
        Linear in the block -> its codes, on the block's device.
    """
    prefix, block = f"{source.family.blocks}.{step.index}.", step.original
    inside = {name: value for name, value in checkpoint.parameters.items() if name.startswith(prefix)}
    set_parameters_(block, {name.removeprefix(prefix): value for name, value in inside.items()})
    codes = {}
    for part in source.family.linears:
        layer = linear(block, part)
        codes[part] = checkpoint.weight(prefix + part, layer.in_features).to(layer.weight.device).unpack()
        set_parameters_(block, {f"{part}.weight": codes[part].decode()})
    return codes


def original_answers(source: SourceModel, tokens: torch.Tensor, *, device: torch.device) -> torch.Tensor:
    """Log-probabilities ``[tokens, vocab]`` for a short piece of ``tokens`` ``[windows, length]``."""
    (hidden,) = run_blocks(source.model, source.family, tokens[:1, :CHECKED_TOKENS], device=device)
    return _answers(source, hidden, device)


def check_same_model(
    source: SourceModel, expected: torch.Tensor, outputs: torch.Tensor, *, device: torch.device, where: object
) -> None:
    """Refuse a checkpoint that says something else than the original.

    Args:
        expected: from :func:`original_answers`.
        outputs: of the checkpoint's last block for the same text or more of it, ``[windows, length, hidden]``.

    Raises:
        HalfbyteError: with the KL divergence of both.
    """
    got = _answers(source, outputs[:1, :CHECKED_TOKENS], device)
    kl = float((expected.exp() * (expected - got)).sum(-1).mean())
    if not kl <= LARGEST_KL:
        raise HalfbyteError(
            f"{where}: the checkpoint is of another model, expected a KL of at most {LARGEST_KL:g} nats per token to "
            f"the original, got {kl:.3g}",
            fix="name the model that the checkpoint was made from with --model_id",
        )


@products(exact=True)
def _answers(source: SourceModel, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
    norm, head = (block_copy(source.model.get_submodule(part), device) for part in _ends(source))
    final = call_block(norm, hidden.to(device, source.dtype), {})
    return call_block(head, final, {}).flatten(0, 1).float().log_softmax(-1)


def _ends(source: SourceModel) -> tuple[str, str]:
    return source.family.final_norm, source.family.head
