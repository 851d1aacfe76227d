"""What tensors a GGUF file will hold, decided and checked before a byte is written, and encoded one at a time.

Row order of q and k follows llama.cpp's rotary layout (see ``halfbyte.models.gguf_source``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor, uint8

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.gguf_source import pairs_from_halves
from halfbyte.models.loading import SourceModel
from halfbyte.quant.ggml.scales import check_q4_0, q4_0_blocks
from halfbyte.quant.ggml.types import Array, encode, row_bytes
from halfbyte.quant.int4 import GroupedWeight, PackedWeight
from halfbyte.targets.gguf_files.metadata import ROPE_FREQS

CHUNK_ELEMENTS = 1 << 24  # encoded at a time: 64 MiB of fp32


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the file.

    Attributes:
        name: GGUF name, e.g. ``blk.0.attn_q.weight``.
        parameter: Hugging Face name, e.g. ``model.layers.0.self_attn.q_proj.weight``; empty for ``rope_freqs.weight``.
        type: ggml type name.
        shape: ``[out, in]`` or ``[features]``, as in PyTorch (GGUF lists them in reverse).
        nbytes: encoded size, without padding.
    """

    name: str
    parameter: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class TensorPlan:
    """A row, and how to make its data: ``chunks()`` yields encoded arrays whose bytes follow one another."""

    row: TensorRow
    chunks: Callable[[], Iterator[Array]]


@dataclass(frozen=True)
class EncodedRows:
    """A matrix that was encoded before: ``rows`` uint8 ``[out, row bytes]`` of ggml type ``type``."""

    type: str
    rows: Tensor


@dataclass(frozen=True)
class TensorTypes:
    """Which ggml type each tensor gets that is encoded here; codes are Q4_0.

    Attributes:
        embedding: of the token embedding, and so of a tied output head.
        output: of an untied output head.
        layers: layer name -> type; a layer not listed is F16.
    """

    embedding: str = "Q8_0"
    output: str = "Q8_0"
    layers: Mapping[str, str] | None = None


def plan_tensors(
    source: SourceModel,
    weights: Mapping[str, PackedWeight],
    overrides: Mapping[str, Tensor],
    types: TensorTypes,
    rope_factors: Tensor | None = None,
    encoded: Mapping[str, EncodedRows] | None = None,
    made: Mapping[str, Callable[[], Tensor]] | None = None,
) -> list[TensorPlan]:
    """Decide name, type and shape of every tensor, in model order.

    Args:
        encoded: matrix, also embedding or head -> what to write for it as it is.
        made: layer name -> makes its weight, fp32 ``[out, in]``, when it is encoded.

    Raises:
        HalfbyteError: names that the model does not have, shapes that do not match, codes that Q4_0 cannot hold, rows
            that a type's block does not divide, or an unknown type; each names the layer.
    """
    parameters = _parameters(source, overrides)
    family = source.family
    outside = {f"{family.embedding}.weight": types.embedding, f"{family.head}.weight": types.output}
    matrices = [name for name, value in parameters.items() if value.ndim == 2 and name not in outside]
    layers = {name.removesuffix(".weight") for name in matrices}
    per_layer, made = types.layers or {}, made or {}
    for name in (*weights, *per_layer, *made):
        if name not in layers:
            raise HalfbyteError(f"{name}: no such layer, expected a layer such as {min(layers, default='none')}")
    plans = []
    if rope_factors is not None:
        row = TensorRow(ROPE_FREQS, "", "F32", tuple(rope_factors.shape), 0)
        plans.append(_plan(row, lambda: rope_factors))
    for name, value in parameters.items():
        layer = name.removesuffix(".weight")
        codes = weights.get(layer)
        ready = (encoded or {}).get(layer)
        if ready is not None:
            kind = ready.type
        elif codes is not None:
            kind = "Q4_0"
        else:
            kind = "F32" if value.ndim == 1 else outside.get(name) or per_layer.get(layer, "F16")
        row = TensorRow(_gguf_name(source, name), name, kind, tuple(value.shape), 0)
        heads = rotary_heads(source, row.name)
        if ready is not None:
            plans.append(_plan(row, _encoded_rows(source, row, ready)))
        elif codes is not None:
            _check_codes(codes, value, layer)
            plans.append(_plan(row, _reordered_codes(codes, heads)))
        elif layer in made:
            plans.append(_plan(row, _reordered_when_made(made[layer], heads)))
        else:
            plans.append(_plan(row, _reordered(value, heads)))
    return plans


def _check_codes(codes: PackedWeight, value: Tensor, layer: str) -> None:
    """Refuse codes of another shape, or that Q4_0 cannot hold."""
    expected, got = list(value.shape), list(codes.shape)
    if expected != got:
        raise HalfbyteError(f"{layer}: codes do not fit the layer, expected {expected}, got {got}")
    check_q4_0(codes.to("meta").unpack(), where=layer)  # the shapes tell


def _parameters(source: SourceModel, overrides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters in model order with overrides in place; an override may untie the output head."""
    parameters: dict[str, Tensor] = dict(source.model.named_parameters())
    head, embedding = f"{source.family.head}.weight", f"{source.family.embedding}.weight"
    for name, value in overrides.items():
        known = parameters[embedding] if name == head else parameters.get(name)
        if known is None:
            raise HalfbyteError(f"{name}: override of a parameter that the model does not have")
        shape = list(known.shape)
        if shape != list(value.shape):
            raise HalfbyteError(f"{name}: override has another shape, expected {shape}, got {list(value.shape)}")
        parameters[name] = value
    return parameters


def _encoded_rows(source: SourceModel, row: TensorRow, ready: EncodedRows) -> Callable[[], Tensor]:
    """The rows themselves, in the order of the file.

    Raises:
        HalfbyteError: they are of another shape.
    """
    expected = [row.shape[0], row_bytes(row.shape[1], row.type, where=row.parameter)]
    if list(ready.rows.shape) != expected:
        got = list(ready.rows.shape)
        raise HalfbyteError(f"{row.parameter}: encoded rows do not fit, expected {expected}, got {got}")
    return _reordered(ready.rows, rotary_heads(source, row.name))


def _plan(row: TensorRow, make: Callable[[], Tensor | GroupedWeight]) -> TensorPlan:
    """Size the row and choose the encoder by what ``make`` returns: codes keep their numbers, floats are encoded."""
    where = row.parameter or row.name
    row = replace(row, nbytes=prod(row.shape[:-1]) * row_bytes(row.shape[-1], row.type, where=where))

    def chunks() -> Iterator[Array]:
        made = make()
        if isinstance(made, GroupedWeight):
            yield q4_0_blocks(made, where=where)
            return
        if made.dtype == uint8:
            yield made.numpy()
            return
        for rows in made.split(max(1, CHUNK_ELEMENTS // row.shape[-1])) if made.ndim > 1 else (made,):
            yield encode(rows, row.type, where=where)

    return TensorPlan(row, chunks)


def _reordered(value: Tensor, heads: int | None) -> Callable[[], Tensor]:
    return lambda: _reorder(value.detach(), heads)


def _reordered_when_made(make: Callable[[], Tensor], heads: int | None) -> Callable[[], Tensor]:
    return lambda: _reorder(make(), heads)


def _reordered_codes(weight: PackedWeight, heads: int | None) -> Callable[[], GroupedWeight]:
    return lambda: PackedWeight(_reorder(weight.packed, heads), _reorder(weight.scales, heads)).unpack()


def _reorder(rows: Tensor, heads: int | None) -> Tensor:
    return rows if heads is None else pairs_from_halves(rows, heads)


def _gguf_name(source: SourceModel, parameter: str) -> str:
    try:
        return source.family.gguf_name(parameter)
    except KeyError as error:
        raise HalfbyteError(f"{parameter}: {source.family.model_type} has no GGUF name for it") from error


def rotary_heads(source: SourceModel, gguf_name: str) -> int | None:
    """Heads whose rows must be reordered in this tensor, or None."""
    if not source.family.interleaved_rope:
        return None
    if ".attn_q." in gguf_name:
        return source.config.num_attention_heads
    return source.config.num_key_value_heads if ".attn_k." in gguf_name else None
