"""int4 codes that other tools stored, as ours: the tensors of one layer in, packed codes and fp16 scales out.

Both layouts put eight codes into an int32, the first in the lowest four bits, as code + 8; so on a little-endian host
their bytes are those of :func:`halfbyte.quant.int4.pack_int4`, but for the highest bit of every code.

- ``pack-quantized`` of compressed-tensors: ``weight_packed`` ``[out, in / 8]``, ``weight_scale`` ``[out, groups]``.
- AutoGPTQ and GPTQModel: ``qweight`` ``[in / 8, out]``, ``scales`` ``[groups, out]``, ``qzeros`` ``[groups, out / 8]``,
  ``g_idx`` ``[in]``. ``qzeros`` holds the zero point less one; from ``gptq_v2`` on the zero point itself.

Sources: compressed-tensors (compressors/pack_quantized), and the dequantisation that GPTQModel, Optimum and vLLM agree
on: ``scale · (code − zero point)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.int4 import ANY_FP16, ScaleRule, check_finite

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
            f"{where}: scales too large for fp16, expected at most 65504, got {float(stored.abs().max()):.6g}",
            fix="these codes cannot be used; quantise the model here instead",
        )
    if not rule.signed and bool((scales < 0).any()):
        raise HalfbyteError(
            f"{where}: scales are negative, expected what vLLM's kernels compute with: none below 0, "
            f"got {int((scales < 0).sum())} of them",
            fix="use --target sim or gguf",
        )
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
            f"{where}: codes are not symmetric, expected zero points in the middle ({layout.name}), "
            f"got others in {other} of {zeros.numel() * zeros.itemsize} bytes",
            fix="use a checkpoint that was quantised symmetrically (sym=True)",
        )


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
            f"{where}: groups are not columns in a row (act-order), "
            f"expected column {column} in group {int(usual[column])}, got group {int(groups[column])}",
            fix="use a checkpoint made with desc_act=False or static_groups=True",
        )


BITS = 4
WEIGHTS = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group"}  # with the library's defaults:
DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": None}
REORDERED = (True, "group", "dynamic")  # values of actorder
FOLDED = ("weight_input", "weight_output")  # where a transform needs nothing at run time


@dataclass(frozen=True)
class CheckpointFormat:
    """A format that can be read.

    Attributes:
        layout: of each layer's tensors.
        group_sizes: that layers may have.
        needs_order: inputs may belong to groups in another order, so a layer has to say which.
        notes: what of the checkpoint is not taken over.
    """

    layout: CodesLayout
    group_sizes: tuple[int, ...]
    needs_order: bool = False
    notes: tuple[str, ...] = ()


def checkpoint_format(config: Mapping[str, Any], *, where: object) -> CheckpointFormat:
    """Read ``quantization_config`` of a ``config.json``, or a ``quantize_config.json``.

    Raises:
        HalfbyteError: another format, other bits, asymmetric codes, scales per channel, or transforms at run time.
    """
    method = str(config.get("quant_method", "gptq" if "desc_act" in config else "unknown")).lower()
    if method not in METHODS:
        raise HalfbyteError(
            f"{where}: codes of this format cannot be taken over, expected {' or '.join(METHODS)}, got {method}",
            fix="use a compressed-tensors (pack-quantized) or GPTQ checkpoint",
        )
    return METHODS[method](config, where)


def _gptq(config: Mapping[str, Any], where: object) -> CheckpointFormat:
    version = str(config.get("checkpoint_format") or config.get("format") or GPTQ_V1.name)
    layouts = {layout.name: layout for layout in (GPTQ_V1, GPTQ_V2)}
    if version not in layouts:
        raise HalfbyteError(f"{where}: unknown GPTQ format, expected {' or '.join(layouts)}, got {version}")
    if config.get("pack_dtype", "int32") != "int32":
        raise HalfbyteError(f"{where}: codes are packed otherwise, expected int32, got {config['pack_dtype']}")
    sizes = []
    for change in ({}, *(value for value in (config.get("dynamic") or {}).values() if value)):
        own = {**config, **change}
        _expect("bits", own.get("bits"), BITS, where)
        _expect("sym", own.get("sym", True), True, where)
        sizes.append(own.get("group_size"))
    return CheckpointFormat(layouts[version], _positive(sizes, where), bool(config.get("desc_act")))


def _compressed_tensors(config: Mapping[str, Any], where: object) -> CheckpointFormat:
    status = config.get("quantization_status", "compressed")
    _expect("quantization_status", status, "compressed", where)
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    _expect("sparsity format", sparsity, "dense", where)
    for name, group in ((config.get("transform_config") or {}).get("config_groups") or {}).items():
        for place in group.get("apply", ()):
            if place.get("location") not in FOLDED:
                raise HalfbyteError(
                    f"{where}, transform {name}: weights are stored for inputs that are transformed at run time, "
                    f"expected only {' and '.join(FOLDED)}, got {place.get('location')}",
                    fix="use a checkpoint whose transforms are folded",
                )
    sizes, orders, notes = [], [], []
    for name, group in (config.get("config_groups") or {}).items():
        place = f"{where}, {name}"
        weights = group.get("weights") if isinstance(group, Mapping) else {}
        if weights is None:  # quantises activations only
            continue
        _expect("format", group.get("format") or config.get("format"), PACK_QUANTIZED.name, place)
        settings = {**DEFAULTS, **weights}
        if settings["strategy"] is None and (settings.get("group_size") or 0) > 0:
            settings["strategy"] = "group"
        for key, value in WEIGHTS.items():
            _expect(f"weights: {key}", settings[key], value, place)
        sizes.append(settings.get("group_size"))
        orders.append(settings.get("actorder"))
        if group.get("input_activations"):
            notes.append("its activation quantisation is not taken over")
    if config.get("kv_cache_scheme"):
        notes.append("its KV cache quantisation is not taken over")
    ordered = any(order in REORDERED for order in orders)
    return CheckpointFormat(PACK_QUANTIZED, _positive(sizes, where), ordered, tuple(dict.fromkeys(notes)))


def _expect(what: str, got: object, expected: object, where: object) -> None:
    if got != expected:
        raise HalfbyteError(
            f"{where}: {what} cannot be taken over, expected {expected}, got {got}",
            fix="use a checkpoint with symmetric int4 weights in groups",
        )


def _positive(sizes: list[Any], where: object) -> tuple[int, ...]:
    for size in sizes or [None]:
        if not isinstance(size, int) or size < 1:
            raise HalfbyteError(
                f"{where}: scales are not in groups, expected a positive group_size, got {size}",
                fix="use a checkpoint with groups, such as 128; -1 means one scale per channel",
            )
    return tuple(dict.fromkeys(sizes))


METHODS: dict[str, Callable[[Mapping[str, Any], object], CheckpointFormat]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
}
