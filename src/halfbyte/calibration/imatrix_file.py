"""Importance matrices: how strongly each input channel of each matrix is driven, and the files that keep it.

Sources: llama.cpp ``tools/imatrix/imatrix.cpp`` and ``common/imatrix-loader.cpp`` (read at 0.5.0). Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from halfbyte.core.errors import HalfbyteError, reading
from halfbyte.core.files import whole_file
from halfbyte.models.gguf_file import open_gguf

SUM, COUNT = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
FIX = "measure it again on this model"


@dataclass(frozen=True, eq=False)
class Importance:
    """Mean squared input of matrices.

    Attributes:
        values: GGUF tensor name, e.g. ``blk.3.ffn_down.weight`` -> fp32 ``[in]``, the mean of x² over tokens; of
            stacked experts one after the other. A tied output head is ``token_embd.weight``, another ``output.weight``.
        tokens: how many were counted (the old .dat format counts chunks only, and they stand here).
        texts: names of the calibration texts.
        chunk_size: tokens per chunk; 0 if not known.

    Raises:
        HalfbyteError: nothing was counted, or a value is negative or not finite.
    """

    values: Mapping[str, np.ndarray]
    tokens: int
    texts: tuple[str, ...] = ()
    chunk_size: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise HalfbyteError(f"importance matrix: importance of no tokens, got {self.tokens}")
        check_values(self.values)

    @property
    def chunk_count(self) -> int:
        """Whole chunks that were counted."""
        return self.tokens // (self.chunk_size or 1)


def check_values(values: Mapping[str, np.ndarray]) -> None:
    """Refuse importance that no mean of squares can be.

    Raises:
        HalfbyteError: naming the first matrix with a negative, infinite or missing number.
    """
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise HalfbyteError(f"{name}: importance is not finite", fix=FIX)
        if (value < 0).any():
            raise HalfbyteError(f"{name}: importance is negative, got {float(value.min())}", fix=FIX)


def check_for(importance: Importance, needed: Mapping[str, int], *, where: object = "importance matrix") -> None:
    """Refuse the importance matrix of another model.

    Args:
        needed: GGUF tensor name -> input features of the matrices that are to have importance; more may be there.
        where: what to name in the error, such as the file.

    Raises:
        HalfbyteError: matrices are missing or have another length: how many, and the first of them.
    """
    sizes = {name: importance.values[name].size for name in needed if name in importance.values}
    wrong = [name for name, size in needed.items() if sizes.get(name) != size]
    if wrong:
        first, size = wrong[0], sizes.get(wrong[0])
        raise HalfbyteError(
            f"{where}: does not belong to this model: {len(wrong)} of {len(needed)} matrices are missing or differ, "
            f"expected {needed[first]} values for {first}, got {'none' if size is None else size}",
            fix=FIX,
        )


def write_imatrix(path: str | Path, importance: Importance) -> None:
    """Write the GGUF file that llama.cpp's tools read; an existing file is replaced when all is written.

    It keeps sums, fp32: means read back are those written where ``tokens`` is a power of two, else within one rounding.

    Raises:
        HalfbyteError: the file cannot be written; nothing is left behind.
    """
    with whole_file(path) as partial:
        writer = GGUFWriter(partial, "imatrix")
        try:
            writer.add_type("imatrix")
            writer.add_array(DATASETS, importance.texts or ("unknown",))  # llama.cpp wants the key
            writer.add_uint32(CHUNK_COUNT, importance.chunk_count)
            writer.add_uint32(CHUNK_SIZE, importance.chunk_size)
            tokens = np.float32(importance.tokens)
            for name, value in sorted(importance.values.items()):
                writer.add_tensor(name + SUM, np.asarray(value, np.float32).reshape(1, -1) * tokens)
                writer.add_tensor(name + COUNT, np.full((1, 1), tokens, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_imatrix(path: str | Path) -> Importance:
    """Read an importance matrix as llama.cpp or :func:`write_imatrix` writes it, GGUF or the older .dat.

    A matrix that saw no tokens (an expert that was never chosen) has ones.

    Raises:
        HalfbyteError: the file is missing, damaged or no importance matrix, or values are negative or not finite.
    """
    path = Path(path)
    with reading(path, "importance matrix", fix=FIX):
        with open(path, "rb") as handle:
            is_gguf = handle.read(4) == b"GGUF"
        return _from_gguf(open_gguf(path), path) if is_gguf else _from_dat(path.read_bytes(), path)


def _from_gguf(reader: GGUFReader, path: Path) -> Importance:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = [name.removesuffix(SUM) for name in tensors if name.endswith(SUM)]
    parts = [tensors.get(name + end) for name in names for end in (SUM, COUNT)]
    if not names or any(part is None or part.tensor_type.name != "F32" for part in parts):
        raise HalfbyteError(f"{path}: not an importance matrix, expected tensors .in_sum2 and .counts in F32", fix=FIX)
    values, tokens = {}, 1
    for name in names:
        counts = np.array(tensors[name + COUNT].data, np.float32).reshape(-1, 1)  # [experts, 1]
        sums = np.array(tensors[name + SUM].data, np.float32).reshape(-1)  # [experts * in]
        if not np.isfinite(counts).all() or sums.size % counts.size:
            raise HalfbyteError(f"{path}, {name}: counts do not fit, got {counts.reshape(-1)[:3]}", fix=FIX)
        rows = sums.reshape(counts.size, -1)
        values[name] = np.where(counts > 0, rows / np.maximum(counts, 1), np.float32(1)).reshape(-1)
        tokens = max(tokens, int(counts.max()))
    found = {key: field.contents() for key in (DATASETS, CHUNK_SIZE) if (field := reader.get_field(key)) is not None}
    return Importance(values, tokens, tuple(found.get(DATASETS, ())), int(found.get(CHUNK_SIZE, 0)))


def _from_dat(data: bytes, path: Path) -> Importance:
    """Entries of name, calls and sums over calls, then the calls of the whole and the text's name, which may lack."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        part = data[position : position + count]
        if count < 0 or len(part) < count:
            raise HalfbyteError(
                f"{path}: not an importance matrix, expected a GGUF file, or a whole .dat file", fix=FIX
            )
        position += count
        return part

    def number() -> int:
        return int.from_bytes(take(4), "little", signed=True)

    values, tokens = {}, 1
    for _ in range(max(number(), 1)):
        name = take(number()).decode("utf-8", "replace")
        calls = number()
        values[name] = np.frombuffer(take(4 * number()), "<f4").astype(np.float32) / np.float32(max(calls, 1))
        tokens = max(tokens, calls)
    if position == len(data):
        return Importance(values, tokens)
    number()
    return Importance(values, tokens, (take(number()).decode("utf-8", "replace"),))
