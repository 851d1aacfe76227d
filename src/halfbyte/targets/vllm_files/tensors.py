"""The tensors of a folder for vLLM: what they are made of, their files, and reading them back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.files import write_text
from halfbyte.core.progress import report
from halfbyte.models.loading import SourceModel
from halfbyte.plan import Codes
from halfbyte.quant.ggml.encoded import save_tensors
from halfbyte.quant.int4 import PackedWeight

OFFSET = 0x88  # turns both two's complement nibbles of a byte into offset ones: code + 8
SCALE_DTYPE = torch.bfloat16
INDEX = "model.safetensors.index.json"
CHUNK_ROWS = 4096  # of a matrix, compared at once
UNPACKED_ROWS = 64  # of each matrix, that are unpacked in the check


@dataclass(frozen=True)
class Stored:
    """One tensor of the folder, made when it is written.

    Attributes:
        name: in the file.
        dtype, shape: as stored.
        make: the tensor; a mapped one is not copied.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


Pack = Callable[[str, PackedWeight], list[Stored]]  # the tensors of one layer's codes


def plan_tensors(source: SourceModel, codes: Codes, pack: Pack) -> list[Stored]:
    """What the folder holds, in the model's order; parameters in the checkpoint's dtype, or fp32 if that loses bits.

    A tied output head is not stored twice, unless a transform untied it.
    """
    own = dict(source.model.named_parameters())
    names = list(own) + [name for name in codes.parameters if name not in own]  # a head that a transform untied
    entries: list[Stored] = []
    for name in names:
        layer = name.removesuffix(".weight")
        if layer in codes.weights:
            entries += pack(layer, codes.weights[layer])
        else:
            entries.append(_parameter(name, codes.parameters.get(name, own.get(name)), source))
    return entries


def packed_words(weight: PackedWeight, where: str) -> torch.Tensor:
    """The codes as the format packs them, int32 ``[out, in / 8]``: what ``pack_to_int32`` makes, without unpacking.

    Raises:
        HalfbyteError: a row does not fill its words.
    """
    if weight.shape[1] % 8:
        raise HalfbyteError(
            f"{where}: a row does not fill 32-bit words, expected a multiple of 8 inputs, got {weight.shape[1]}",
            fix="use --target sim for this model",
        )
    return (weight.packed ^ OFFSET).view(torch.int32)  # the lowest nibble of a little-endian word is the first code


def exact_scales(weight: PackedWeight, where: str) -> torch.Tensor:
    """The scales in bf16.

    Raises:
        HalfbyteError: one is not a bf16 number.
    """
    scales = weight.scales.to(SCALE_DTYPE)
    if not torch.equal(scales.float(), weight.scales.float()):
        raise HalfbyteError(
            f"{where}: scales are not what vLLM computes with, expected bf16 numbers",
            fix="search again with --target vllm",
        )
    return scales


def _parameter(name: str, value: torch.Tensor | None, source: SourceModel) -> Stored:
    assert value is not None, name
    value, wanted = value.detach(), source.config.dtype
    if wanted not in (torch.bfloat16, torch.float16) or not _exact(value, wanted):
        wanted = value.dtype
    return Stored(name, wanted, tuple(value.shape), lambda: value.to(wanted))


def _exact(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds every number of ``value``."""
    return value.dtype == dtype or all(
        torch.equal(part.to(dtype).to(value.dtype), part) for part in value.split(CHUNK_ROWS)
    )


def write_tensors(folder: Path, entries: Sequence[Stored], shard_size: str | int) -> None:
    """Write ``entries`` as safetensors files of at most ``shard_size``, one file's tensors in memory at a time.

    Raises:
        HalfbyteError: a full disk, or what the entries refuse.
    """
    known = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        known,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = known[name].make()
            done += 1
            report("export", done - 1, len(entries), name)
        save_tensors(folder / file, tensors, "pt")
        report("export", done, len(entries), file)
    if split.is_sharded:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": split.tensor_to_filename,
        }
        write_text(folder / INDEX, json.dumps(index, indent=2))


def check_tensors(
    folder: Path, entries: Sequence[Stored], codes: Codes, kind: str, unpack: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Read the files back and compare every tensor with what was meant, and some rows of each matrix of codes,
    unpacked by the format's own rules, with the plan's.

    Args:
        kind: the last part of the name of a tensor of codes.
        unpack: its rows -> int8 codes ``[rows, in]``.

    Raises:
        HalfbyteError: naming the first tensor that is missing, unexpected or different.
    """
    index = folder / INDEX
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    expected = {entry.name: entry for entry in entries}
    seen: set[str] = set()
    for file in sorted(files):
        where = folder / file
        try:
            with safe_open(where, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    if name in seen or name not in expected:
                        raise HalfbyteError(f"{where}: unexpected tensor, got {name}")
                    seen.add(name)
                    found, layer = handle.get_tensor(name), name.removesuffix(f".{kind}")
                    same = _same(found, expected[name])
                    if same and layer != name and layer in codes.weights:
                        known = codes.weights[layer]
                        some = PackedWeight(known.packed[:UNPACKED_ROWS], known.scales[:UNPACKED_ROWS], known.grid)
                        same = torch.equal(unpack(found[:UNPACKED_ROWS]), some.unpack().codes)
                    if not same:
                        raise HalfbyteError(f"{where}, {name}: tensor data differs", fix="export again")
                    report("check tensors", len(seen), len(entries), name)
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(f"{where}: written file cannot be read, got {first_line(error)}") from error
    if seen != set(expected):
        raise HalfbyteError(f"{folder}: tensors are missing, got {', '.join(sorted(set(expected) - seen)[:3])}")


def _same(found: torch.Tensor, entry: Stored) -> bool:
    if (found.dtype, tuple(found.shape)) != (entry.dtype, entry.shape):
        return False
    meant = entry.make()
    if found.dtype.itemsize == 1:  # torch compares no floats of 8 bits
        found, meant = found.view(torch.uint8), meant.view(torch.uint8)
    return torch.equal(found, meant)
