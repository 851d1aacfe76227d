"""Turn a GGUF file into another file type with llama.cpp's own quantisers.

A library with ``llama_model_quantize`` does it whole. The one in the ``xllamacpp`` wheel was linked without it but has
``ggml_quantize_chunk``, the function below it, so here the file is read, each tensor's type chosen
(:mod:`halfbyte.quant.ggml.ftypes`) and its rows encoded. Both ways wrote the same bytes for every file type, with and
without an importance matrix (compared with llama-cpp-python 0.3.36 on dense Llama-shaped models).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from halfbyte.calibration.imatrix_file import check_values, read_imatrix
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import whole_file
from halfbyte.models.gguf_file import open_gguf
from halfbyte.models.layers import Outcome
from halfbyte.quant.ggml.ftypes import Shape, block_size, file_type_number, is_quantised, tensor_type

CHUNK_ELEMENTS = 1 << 22  # float32 values in memory per thread: 16 MiB
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


def read_importance(imatrix: str | Path | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean squared input of each matrix: tensor name -> float32 [in], from a file or given so.

    Raises:
        HalfbyteError: not an importance-matrix file, or a value is negative or not finite.
    """
    if not isinstance(imatrix, Mapping):
        return dict(read_imatrix(imatrix).values)
    values = {name: np.ascontiguousarray(value, np.float32).reshape(-1) for name, value in imatrix.items()}
    check_values(values)
    return values


def quantize_native(
    api: Any,
    take_error: Callable[[], str | None],
    source: Path,
    target: Path,
    file_type: str,
    threads: int,
    importance: Mapping[str, np.ndarray],
) -> tuple[Outcome, ...]:
    """Let ``llama_model_quantize`` write the whole file; it reports no outcomes."""
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = file_type_number(file_type), threads, True
    if importance:
        entry = getattr(api, "llama_model_imatrix_data", None)
        if entry is None:
            raise HalfbyteError("llama-cpp-python: this version takes no importance matrix", fix="use xllamacpp")
        entries = (entry * (len(importance) + 1))()  # ends with a null name
        for slot, (name, values) in zip(entries, importance.items(), strict=False):
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    with whole_file(target) as partial:
        status = api.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
        if status != 0:
            raise HalfbyteError(f"{source}: llama.cpp cannot quantise this file, got {take_error() or status}")
    return ()


def quantize_rows(
    api: Any, source: Path, target: Path, file_type: str, threads: int, importance: Mapping[str, np.ndarray]
) -> tuple[Outcome, ...]:
    """Encode the matrices of ``source`` with ``ggml_quantize_chunk`` into ``target``, one tensor in memory at a time.

    Returns:
        One outcome per tensor that did not get the type of the recipe, or got it without its importance.
    """
    number = file_type_number(file_type)
    reader = open_gguf(source)
    shape = _shape(reader, bool(importance), source)
    types, outcomes = {}, []
    for tensor in reader.tensors:
        name = tensor.name
        types[name] = tensor.tensor_type
        if not is_quantised(name, len(tensor.shape)):
            continue
        asked, types[name] = tensor_type(file_type, name, int(tensor.shape[0]), shape)
        notes = []
        if types[name] != asked:
            notes.append(f"{asked.name} needs rows divisible by {block_size(asked.name)}, this has {tensor.shape[0]}")
        if importance and name not in importance and name != "token_embd.weight":
            notes.append("no importance values")
        if notes:
            outcomes.append(Outcome(name, asked.name, types[name].name, "; ".join(notes)))
    with whole_file(target) as partial, ThreadPoolExecutor(threads) as pool:
        writer = gguf.GGUFWriter(partial, shape.architecture)
        try:
            _copy_metadata(reader, writer, number)
            for tensor in reader.tensors:
                columns, rows = int(tensor.shape[0]), int(tensor.n_elements // tensor.shape[0])
                size = rows * _row_bytes(types[tensor.name], columns)
                dims = [int(n) for n in reversed(tensor.shape)]
                writer.add_tensor_info(tensor.name, dims, np.dtype(np.float32), size, types[tensor.name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in reader.tensors:
                data = _encode(api, pool, tensor, types[tensor.name], importance.get(tensor.name))
                writer.write_tensor_data(data)
        finally:
            writer.close()
    return tuple(outcomes)


def _shape(reader: gguf.GGUFReader, has_imatrix: bool, path: Path) -> Shape:
    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        found = field.contents() if field is not None else default
        if found is None:
            raise HalfbyteError(f"{path}: GGUF file has no such key, expected {key}")
        return max(found) if isinstance(found, list) else found

    architecture = value("general.architecture")
    if int(value("split.count", 1)) > 1:
        raise HalfbyteError(f"{path}: split files are not read here", fix="merge the parts first")
    heads = int(value(f"{architecture}.attention.head_count"))
    kv_heads = int(value(f"{architecture}.attention.head_count_kv", heads))
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return Shape(architecture, int(value(f"{architecture}.block_count")), heads, kv_heads, tied, has_imatrix)


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, file_type_number: int) -> None:
    own = {"general.architecture", "general.alignment", "general.file_type", "general.quantization_version"}
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "split.")) or name in own:
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(file_type_number)
    writer.add_quantization_version(QUANTIZATION_VERSION)


def _row_bytes(kind: gguf.GGMLQuantizationType, columns: int) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return columns // block * size


def _encode(
    api: Any, pool: ThreadPoolExecutor, tensor: gguf.ReaderTensor, kind: gguf.GGMLQuantizationType, importance: Any
) -> np.ndarray:
    """The bytes of one tensor in another type, uint8 [rows, row_bytes]; its own bytes when it has that type already."""
    if kind == tensor.tensor_type:
        return tensor.data
    columns = int(tensor.shape[0])
    if importance is not None and importance.size != columns:
        raise HalfbyteError(f"{tensor.name}: importance does not fit, expected {columns} values, got {importance.size}")
    source = tensor.data.reshape(-1, tensor.data.shape[-1])  # [rows, row bytes or columns]
    encoded = np.empty((len(source), _row_bytes(kind, columns)), np.uint8)
    weights = importance.ctypes.data if importance is not None else None

    def encode(start: int) -> None:
        part = gguf.dequantize(source[start : start + step], tensor.tensor_type)
        part = np.ascontiguousarray(part, np.float32)  # [rows of the chunk, columns]
        if not np.isfinite(part).all():
            raise HalfbyteError(f"{tensor.name}: weights are not finite")
        rows = encoded[start : start + step]
        api.ggml_quantize_chunk(int(kind), part.ctypes.data, rows.ctypes.data, 0, len(part), columns, weights)

    step = max(1, CHUNK_ELEMENTS // columns)
    list(pool.map(encode, range(0, len(source), step)))
    return encoded
