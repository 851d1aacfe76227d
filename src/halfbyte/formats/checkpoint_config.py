"""What a checkpoint's quantisation config says: which layout its codes have, or why they cannot be W4 of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.formats.checkpoint_codes import GPTQ_V1, GPTQ_V2, PACK_QUANTIZED, CodesLayout

BITS = 4
WEIGHTS = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group"}  # with the library's defaults:
DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": None}
REORDERED = (True, "group", "dynamic")  # values of actorder
FOLDED = ("weight_input", "weight_output")  # where a transform needs nothing at run time


@dataclass(frozen=True)
class CodesFormat:
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


def codes_format(config: Mapping[str, Any], *, where: object) -> CodesFormat:
    """Read ``quantization_config`` of a ``config.json``, or a ``quantize_config.json``.

    Raises:
        HalfbyteError: another format, other bits, asymmetric codes, scales per channel, or transforms at run time.
    """
    method = str(config.get("quant_method", "gptq" if "desc_act" in config else "unknown")).lower()
    if method not in METHODS:
        raise HalfbyteError(
            "codes of this format cannot be taken over", where=where, expected=" or ".join(METHODS), got=method,
            fix="use a compressed-tensors (pack-quantized) or GPTQ checkpoint",
        )  # fmt: skip
    return METHODS[method](config, where)


def _gptq(config: Mapping[str, Any], where: object) -> CodesFormat:
    version = str(config.get("checkpoint_format") or config.get("format") or GPTQ_V1.name)
    layouts = {layout.name: layout for layout in (GPTQ_V1, GPTQ_V2)}
    if version not in layouts:
        raise HalfbyteError("unknown GPTQ format", where=where, expected=" or ".join(layouts), got=version)
    if config.get("pack_dtype", "int32") != "int32":
        raise HalfbyteError("codes are packed otherwise", where=where, expected="int32", got=config["pack_dtype"])
    sizes = []
    for change in ({}, *(value for value in (config.get("dynamic") or {}).values() if value)):
        own = {**config, **change}
        _expect("bits", own.get("bits"), BITS, where)
        _expect("sym", own.get("sym", True), True, where)
        sizes.append(own.get("group_size"))
    return CodesFormat(layouts[version], _positive(sizes, where), bool(config.get("desc_act")))


def _compressed_tensors(config: Mapping[str, Any], where: object) -> CodesFormat:
    status = config.get("quantization_status", "compressed")
    _expect("quantization_status", status, "compressed", where)
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    _expect("sparsity format", sparsity, "dense", where)
    for name, group in ((config.get("transform_config") or {}).get("config_groups") or {}).items():
        for place in group.get("apply", ()):
            if place.get("location") not in FOLDED:
                raise HalfbyteError(
                    "weights are stored for inputs that are transformed at run time",
                    where=f"{where}, transform {name}", expected=f"only {' and '.join(FOLDED)}",
                    got=place.get("location"), fix="use a checkpoint whose transforms are folded",
                )  # fmt: skip
    sizes, orders, notes = [], [], []
    for name, group in (config.get("config_groups") or {}).items():
        place = f"{where}, {name}"
        weights = group.get("weights") if isinstance(group, Mapping) else {}
        if weights is None:  # quantises activations only
            continue
        _expect("format", group.get("format") or config.get("format"), PACK_QUANTIZED.name, place)
        given = {**DEFAULTS, **weights}
        if given["strategy"] is None and (given.get("group_size") or 0) > 0:
            given["strategy"] = "group"
        for key, value in WEIGHTS.items():
            _expect(f"weights: {key}", given[key], value, place)
        sizes.append(given.get("group_size"))
        orders.append(given.get("actorder"))
        if group.get("input_activations"):
            notes.append("its activation quantisation is not taken over")
    if config.get("kv_cache_scheme"):
        notes.append("its KV cache quantisation is not taken over")
    ordered = any(order in REORDERED for order in orders)
    return CodesFormat(PACK_QUANTIZED, _positive(sizes, where), ordered, tuple(dict.fromkeys(notes)))


def _expect(what: str, got: object, expected: object, where: object) -> None:
    if got != expected:
        raise HalfbyteError(
            f"{what} cannot be taken over", where=where, expected=expected, got=got,
            fix="use a checkpoint with symmetric int4 weights in groups",
        )  # fmt: skip


def _positive(sizes: list[Any], where: object) -> tuple[int, ...]:
    for size in sizes or [None]:
        if not isinstance(size, int) or size < 1:
            raise HalfbyteError(
                "scales are not in groups", where=where, expected="a positive group_size", got=size,
                fix="use a checkpoint with groups, such as 128; -1 means one scale per channel",
            )  # fmt: skip
    return tuple(dict.fromkeys(sizes))


METHODS: dict[str, Callable[[Mapping[str, Any], object], CodesFormat]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
}
