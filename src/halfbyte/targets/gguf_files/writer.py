"""Write a model as one GGUF file that llama.cpp runs, and check what was written.

W4 codes are written as they are: a layer's Q4_0 blocks hold the same codes and the same fp16 scales that were searched.
Source of the container: the GGUF specification (ggml, docs/gguf.md), written with the ``gguf`` package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_output, check_space, scratch_folder, whole_file
from halfbyte.core.progress import report
from halfbyte.models.gguf_file import open_gguf, open_source
from halfbyte.models.gguf_source import halves_from_pairs
from halfbyte.models.loading import SourceModel
from halfbyte.quant.ggml.types import decode
from halfbyte.quant.int4 import PackedWeight
from halfbyte.targets.gguf_files.metadata import add_hparams_, add_tokenizer_, copy_keys_, rope_frequency_factors
from halfbyte.targets.gguf_files.tensors import (
    EncodedRows,
    TensorPlan,
    TensorRow,
    TensorTypes,
    plan_tensors,
    rotary_heads,
)

PREFIX = "halfbyte."
NAMED_AS = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # no file type has the name of the tensor type
METADATA_TYPES = {  # the first that fits; a bool is an int too
    str: GGUFValueType.STRING,
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.INT64,
    float: GGUFValueType.FLOAT64,
}


def write_gguf(
    path: str | Path,
    source: SourceModel,
    *,
    weights: Mapping[str, PackedWeight] | None = None,
    overrides: Mapping[str, torch.Tensor] | None = None,
    layer_types: Mapping[str, str] | None = None,
    embedding_type: str = "Q8_0",
    output_type: str = "Q8_0",
    encoded: Mapping[str, EncodedRows] | None = None,
    made: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    metadata: Mapping[str, str | int | float] | None = None,
) -> list[TensorRow]:
    """Write ``source`` to ``path``, one tensor in memory at a time; an existing file is replaced when all is written.

    Args:
        weights: layer name -> codes; written as Q4_0. Layers without codes are F16, or what ``layer_types`` says.
            Codes go before an override of the same weight.
        overrides: parameter name -> tensor of the same shape, in place of the model's own (folded norms, biases). An
            override of the output head unties it from the embedding.
        layer_types: layer name -> a type of ``halfbyte.quant.ggml.types.WRITABLE``.
        embedding_type, output_type: types of the token embedding and of an untied output head. A tied head is not
            written: llama.cpp then uses the embedding, and ``embedding_type`` decides for both.
        encoded: matrix, also embedding or head -> what to write for it as it is, before everything else.
        made: layer without codes -> makes its weight, fp32 ``[out, in]``, when it is written, in place of the model's.
        metadata: values to keep in the file under ``halfbyte.`` keys.

    Returns:
        One row per tensor, in file order. Norms and biases are F32.

    Raises:
        HalfbyteError: before writing, what :func:`plan_tensors`, :func:`add_hparams_` and :func:`add_tokenizer_`
            refuse, or too little disk space; while writing, values beyond a type's range or a full disk. Nothing is
            left behind.
    """
    path = check_output(path, force=True)
    reader = open_source(source.origin.gguf_file) if source.origin.gguf_file else None
    types = TensorTypes(embedding_type, output_type, layer_types)
    factors = rope_frequency_factors(source.config)
    plans = plan_tensors(source, weights or {}, overrides or {}, types, factors, encoded, made)
    check_space(path, sum(plan.row.nbytes for plan in plans))
    with whole_file(path) as partial:
        alignment = _write_header(partial, source, reader, plans, metadata or {})
        _append_data(partial, plans, alignment)
    return [plan.row for plan in plans]


def header_bytes(source: SourceModel) -> int:
    """Size of a file of ``source`` before the first tensor's data; the types of the tensors do not change it.

    Raises:
        HalfbyteError: what :func:`check_exportable` refuses.
    """
    reader = open_source(source.origin.gguf_file) if source.origin.gguf_file else None
    plans = plan_tensors(source, {}, {}, TensorTypes("F16", "F16"), rope_frequency_factors(source.config))
    with scratch_folder() as folder:
        path = folder / "header"
        _write_header(path, source, reader, plans, {})
        return path.stat().st_size


def check_exportable(source: SourceModel) -> None:
    """Refuse, before a search, a model whose hyperparameters or tokenizer a GGUF file cannot express.

    Raises:
        HalfbyteError: what :func:`add_hparams_` and :func:`add_tokenizer_` refuse.
    """
    if source.origin.gguf_file is None:
        writer = GGUFWriter(None, source.family.gguf_arch)
        add_hparams_(writer, source.config, where=source.origin.model_id)
        add_tokenizer_(writer, source.tokenizer, source.config, where=source.origin.model_id)


def check_gguf(
    path: str | Path,
    source: SourceModel,
    weights: Mapping[str, PackedWeight] | None = None,
    overrides: Mapping[str, torch.Tensor] | None = None,
    layer_types: Mapping[str, str] | None = None,
    encoded: Mapping[str, EncodedRows] | None = None,
    made: Mapping[str, Callable[[], torch.Tensor]] | None = None,
) -> int:
    """Read a written file back and compare it with what it was made from (arguments as for :func:`write_gguf`).

    Every tensor must be there, of the right type and shape, with the same bytes when it is encoded once more; every
    Q4_0 layer must dequantise to exactly what its codes decode to.

    Returns:
        How many tensors were compared.

    Raises:
        HalfbyteError: naming the first tensor that is missing, unexpected or different.
    """
    weights = weights or {}
    reader = open_gguf(Path(path))
    family = source.family
    found = {tensor.name: tensor for tensor in reader.tensors}
    written = {name: tensor.tensor_type.name for name, tensor in found.items()}
    embedding, head = family.gguf_name(f"{family.embedding}.weight"), family.gguf_name(f"{family.head}.weight")
    types = TensorTypes(written.get(embedding, "F16"), written.get(head, "F16"), layer_types)
    factors = rope_frequency_factors(source.config)
    plans = plan_tensors(source, weights, overrides or {}, types, factors, encoded, made)
    names = {plan.row.name for plan in plans}
    if names != set(found):
        differing = sorted(names.symmetric_difference(found))
        raise HalfbyteError(f"{path}: tensors are missing or unexpected, got {', '.join(differing[:3])}")
    for row, chunks in ((plan.row, plan.chunks) for plan in plans):
        tensor, where = found[row.name], f"{path}, {row.name}"
        shape = tuple(int(size) for size in reversed(tensor.shape))
        expected, got = (row.type, row.shape), (written[row.name], shape)
        if expected != got:
            raise HalfbyteError(f"{where}: tensor is of another type or shape, expected {expected}, got {got}")
        stored, start = tensor.data.reshape(-1).view(np.uint8), 0
        for chunk in chunks():
            data = chunk.reshape(-1).view(np.uint8)
            if not np.array_equal(stored[start : start + data.size], data):
                raise HalfbyteError(f"{where}: tensor data differs", fix="export again")
            start += data.size
        codes = weights.get(row.parameter.removesuffix(".weight"))
        if codes is not None and row.type == "Q4_0":
            values = torch.from_numpy(decode(tensor.data, row.type))
            heads = rotary_heads(source, row.name)
            if heads is not None:
                values = halves_from_pairs(values, heads)
            if not torch.equal(values, codes.decode().cpu()):
                raise HalfbyteError(f"{where}: blocks do not decode to the codes", fix="report this as a bug")
    return len(plans)


def _write_header(
    path: Path,
    source: SourceModel,
    reader: GGUFReader | None,
    plans: list[TensorPlan],
    metadata: Mapping[str, str | int | float],
) -> int:
    """Write everything before the tensors' data; returns the alignment of the data."""
    writer = GGUFWriter(path, source.family.gguf_arch)
    _add_keys_(writer, source, reader, plans, metadata)
    for plan in plans:
        kind = GGMLQuantizationType[plan.row.type]
        writer.add_tensor_info(plan.row.name, plan.row.shape, np.dtype(np.float32), plan.row.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return writer.data_alignment


def _add_keys_(
    writer: GGUFWriter,
    source: SourceModel,
    reader: GGUFReader | None,
    plans: list[TensorPlan],
    metadata: Mapping[str, str | int | float],
) -> None:
    if reader is not None:
        copy_keys_(writer, reader)
    else:
        writer.add_type("model")
        writer.add_name(Path(source.origin.model_id).name)
        add_hparams_(writer, source.config, where=source.origin.model_id)
        add_tokenizer_(writer, source.tokenizer, source.config, where=source.origin.model_id)
    writer.add_file_type(_file_type(source, plans))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in metadata.items():
        kind = next(kind for base, kind in METADATA_TYPES.items() if isinstance(value, base))
        writer.add_key_value(PREFIX + key.removeprefix(PREFIX), value, kind)


def _file_type(source: SourceModel, plans: list[TensorPlan]) -> LlamaFileType:
    """The type that most weights inside the blocks have."""
    sizes: Counter[str] = Counter()
    for plan in plans:
        if plan.row.parameter.startswith(source.family.blocks) and len(plan.row.shape) == 2:
            sizes[plan.row.type] += plan.row.shape[0] * plan.row.shape[1]
    most = sizes.most_common(1)[0][0]
    return LlamaFileType.ALL_F32 if most == "F32" else LlamaFileType[f"MOSTLY_{NAMED_AS.get(most, most)}"]


def _append_data(path: Path, plans: list[TensorPlan], alignment: int) -> None:
    """Append each tensor's data at the aligned offset that the header announced.

    Not ``GGUFWriter.write_tensor_data``: it wants a tensor whole, and numpy hides a full disk behind an error without
    a number.
    """
    with open(path, "ab") as handle:
        for done, plan in enumerate(plans, start=1):
            handle.write(bytes(-handle.tell() % alignment))
            for chunk in plan.chunks():
                handle.write(np.ascontiguousarray(chunk).data)
            report("export", done, len(plans), plan.row.name)
        handle.write(bytes(-handle.tell() % alignment))
