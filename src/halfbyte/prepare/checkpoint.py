"""Preparation with codes that a checkpoint brings along: nothing is chosen but the range of 4-bit activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.calibration.blocks import block_copy
from halfbyte.calibration.walk import TwinStep
from halfbyte.models.checkpoint import CheckpointCodes, QuantisedFolder
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import blocks, head_dim, linear
from halfbyte.prepare.frames import adopt_frame_, check_frame, stream_rotation
from halfbyte.quant.int4 import GroupedWeight, ScaleRule
from halfbyte.quant.quant_linear import set_parameters_


@dataclass(frozen=True)
class Given:
    """A checkpoint's codes, and how its residual stream is turned.

    Attributes:
        codes: checked.
        turn: see :func:`halfbyte.prepare.frames.stream_rotation`.
    """

    codes: CheckpointCodes
    turn: torch.Tensor | None


def given_codes(folder: QuantisedFolder, source: SourceModel, rule: ScaleRule, *, device: torch.device) -> Given:
    """Check a checkpoint against its unquantised model; the first and the last block down to the weights.

    Raises:
        HalfbyteError: what :class:`CheckpointCodes` refuses, or weights that are the model's in no coordinates known.
    """
    codes, name = CheckpointCodes(folder, source, rule), f"{source.family.embedding}.weight"
    own = source.model.get_parameter(name)
    turn = stream_rotation(own, codes.parameters.get(name, own), device, where=f"{folder.path}, {name}")
    given, count = Given(codes, turn), source.config.num_hidden_layers
    for index in sorted({0, count - 1}):
        block = block_copy(blocks(source.model, source.family)[index], device, torch.float32)
        adopt_block_(block, index, source, given)
    return given


def adopt_ends_(source: SourceModel, given: Given) -> None:
    """Give the model the checkpoint's embedding, final norm and head, in place."""
    inside = f"{source.family.blocks}."
    ends = {name: value for name, value in given.codes.parameters.items() if not name.startswith(inside)}
    set_parameters_(source.model, ends)


def adopt_block_(block: nn.Module, index: int, source: SourceModel, given: Given) -> dict[str, GroupedWeight]:
    """Bring an unquantised fp32 block into the checkpoint's coordinates, in place.

    Returns:
        The linears' codes, on the block's device.

    Raises:
        HalfbyteError: weights that the codes are not a rounding of.
    """
    family, prefix = source.family, f"{source.family.blocks}.{index}."
    device = linear(block, family.up).weight.device
    codes: dict[str, GroupedWeight] = {}
    for part in family.linears:
        codes[part] = given.codes.weight(prefix + part, linear(block, part).in_features).to(device).unpack()
    norms = {}
    for norm, _ in family.norm_readers:
        name = f"{prefix}{norm}.weight"
        norms[norm] = given.codes.parameters.get(name, block.get_parameter(f"{norm}.weight"))
    decoded = {part: weight.decode() for part, weight in codes.items()}
    adopt_frame_(block, family, decoded, norms, given.turn, head_dim(source.config))
    for part, weight in decoded.items():
        check_frame(linear(block, part).weight, weight, where=f"{given.codes.folder.path}, {prefix}{part}")
    return codes


def adopt_parameters_(step: TwinStep, source: SourceModel, given: Given) -> None:
    """Give the block that becomes the quantised one the checkpoint's own norms and biases, in place."""
    prefix = f"{source.family.blocks}.{step.index}."
    own = {
        name.removeprefix(prefix): value for name, value in given.codes.parameters.items() if name.startswith(prefix)
    }
    set_parameters_(step.quantised, own)
