"""int4 codes that other tools stored, as ours: the tensors of one layer in, packed codes and fp16 scales out.

Both layouts put eight codes into an int32, the first in the lowest four bits, as code + 8; so on a little-endian host
their bytes are those of :func:`halfbyte.numerics.packing.pack_int4`, but for the highest bit of every code.

- ``pack-quantized`` of compressed-tensors: ``weight_packed`` ``[out, in / 8]``, ``weight_scale`` ``[out, groups]``.
- AutoGPTQ and GPTQModel: ``qweight`` ``[in / 8, out]``, ``scales`` ``[groups, out]``, ``qzeros`` ``[groups, out / 8]``,
  ``g_idx`` ``[in]``. ``qzeros`` holds the zero point less one; from ``gptq_v2`` on the zero point itself.

Sources: compressed-tensors (compressors/pack_quantized), and the dequantisation that GPTQModel, Optimum and vLLM agree
on: ``scale · (code − zero point)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.formats.int_group import ANY_FP16, ScaleRule, check_finite

PER_WORD = 8  # codes in an int32
TURN = 0x88  # code + 8 as our two's complement, for two codes


@dataclass(frozen=True)
class CodesLayout:
    """How a format stores the codes of one layer.

    Attributes:
        name: of the format, for messages.
        codes, scales, zeros, order: last part of the tensors' names; only codes and scales are always there.
        needs_zeros: a layer without zero points is damaged; otherwise it is symmetric.
        zero_byte: what each byte of symmetric zero points is.
        inputs_first: the input is the first axis.
    """

    name: str
    codes: str
    scales: str
    zeros: str
    order: str
    needs_zeros: bool
    zero_byte: int
    inputs_first: bool

    def codes_shape(self, out_features: int, in_features: int) -> list[int]:
        """Of the tensor of codes; the last word may be filled up."""
        words = -(-in_features // PER_WORD)
        return [words, out_features] if self.inputs_first else [out_features, words]

    def scales_shape(self, out_features: int, groups: int) -> list[int]:
        """Of the tensor of scales."""
        return [groups, out_features] if self.inputs_first else [out_features, groups]


PACK_QUANTIZED = CodesLayout(
    "pack-quantized", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", False, 0x00, False
)
GPTQ_V1 = CodesLayout("gptq", "qweight", "scales", "qzeros", "g_idx", True, 0x77, True)
GPTQ_V2 = CodesLayout("gptq_v2", "qweight", "scales", "qzeros", "g_idx", True, 0x88, True)


def read_codes(layout: CodesLayout, stored: torch.Tensor, in_features: int) -> torch.Tensor:
    """Packed codes as ours, uint8 ``[out, in / 2]``, from int32 of ``layout.codes_shape``."""
    words = (stored.T if layout.inputs_first else stored).contiguous()  # [out, in / 8]
    return (words.view(torch.uint8)[:, : in_features // 2] ^ TURN).contiguous()


def read_scales(
    layout: CodesLayout, stored: torch.Tensor, rule: ScaleRule = ANY_FP16, *, where: object
) -> tuple[torch.Tensor, int]:
    """Scales as ours, fp16 ``[out, groups]``, and how many of them had to be rounded to be what ``rule`` allows.

    A bf16 scale has 8 significant bits, and fp16's smallest step is 2^-24: so those of 2^-17 and more are exact.

    Raises:
        HalfbyteError: scales that are not finite, too large for fp16, or negative where the rule allows none.
    """
    check_finite(stored, where, "scales are")
    scales = rule.rounded(stored)
    if bool(torch.isinf(scales).any()):
        raise HalfbyteError(
            "scales too large for fp16", where=where, expected="at most 65504", got=f"{float(stored.abs().max()):.6g}",
            fix="these codes cannot be used; quantise the model here instead",
        )  # fmt: skip
    if not rule.signed and bool((scales < 0).any()):
        raise HalfbyteError(
            "scales are negative", where=where, expected="what vLLM's kernels compute with: none below 0",
            got=f"{int((scales < 0).sum())} of them", fix="use --target sim or gguf",
        )  # fmt: skip
    rounded = int((scales.float() != stored.float()).sum())
    return (scales.T if layout.inputs_first else scales).contiguous(), rounded


def check_symmetric(layout: CodesLayout, zeros: torch.Tensor, *, where: object) -> None:
    """Refuse zero points that are not in the middle.

    Raises:
        HalfbyteError: naming how many.
    """
    other = int((zeros.contiguous().view(torch.uint8) != layout.zero_byte).sum())
    if other:
        raise HalfbyteError(
            "codes are not symmetric", where=where, expected=f"zero points in the middle ({layout.name})",
            got=f"others in {other} of {zeros.numel() * zeros.itemsize} bytes",
            fix="use a checkpoint that was quantised symmetrically (sym=True)",
        )  # fmt: skip


def check_order(groups: torch.Tensor, group_size: int, *, where: object) -> None:
    """Refuse groups that are not columns in a row (act-order without static groups).

    Args:
        groups: the group of each input, int ``[in]``.

    Raises:
        HalfbyteError: naming the first column that is elsewhere. All −1 means the order is as usual.
    """
    usual = torch.arange(len(groups)) // group_size
    moved = (groups.long() != usual).nonzero()
    if len(moved) and not bool((groups == -1).all()):
        column = int(moved[0])
        raise HalfbyteError(
            "groups are not columns in a row (act-order)", where=where,
            expected=f"column {column} in group {int(usual[column])}", got=f"group {int(groups[column])}",
            fix="use a checkpoint made with desc_act=False or static_groups=True",
        )  # fmt: skip
