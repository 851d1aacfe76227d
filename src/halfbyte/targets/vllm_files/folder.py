"""Write a W4 plan as a Hugging Face folder in the compressed-tensors format, and read it back.

Per quantised layer: ``weight_packed`` (int32 ``[out, in / 8]``, eight offset codes to a word), ``weight_scale`` (bf16
``[out, groups]``) and ``weight_shape``; a config group per activation width and group size. Source of the format: the
``compressed-tensors`` package, ``compressors/pack_quantized`` and ``quantization/quant_config.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.compressors.model_compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformLocation, TransformScheme
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.files import write_text
from halfbyte.core.progress import report
from halfbyte.models.loading import SourceModel
from halfbyte.plan import Codes, LayerPlan, Plan
from halfbyte.quant.ggml.encoded import save_tensors
from halfbyte.quant.int4 import PackedWeight, unpack_int4

OFFSET = 0x88  # turns both two's complement nibbles of a byte into offset ones: code + 8
SCALE_DTYPE = torch.bfloat16
INDEX = "model.safetensors.index.json"
CHUNK_ROWS = 4096  # of a matrix, compared at once
UNPACKED_ROWS = 64  # of each matrix, that the library unpacks in the check


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


def plan_tensors(source: SourceModel, codes: Codes) -> list[Stored]:
    """What the folder holds, in the model's order; parameters in the checkpoint's dtype, or fp32 if that loses bits.

    A tied output head is not stored twice, unless a transform untied it.
    """
    own = dict(source.model.named_parameters())
    names = list(own) + [name for name in codes.parameters if name not in own]  # a head that a transform untied
    entries: list[Stored] = []
    for name in names:
        layer = name.removesuffix(".weight")
        if layer in codes.weights:
            entries += _packed(layer, codes.weights[layer])
        else:
            entries.append(_parameter(name, codes.parameters.get(name, own.get(name)), source))
    return entries


def _packed(layer: str, weight: PackedWeight) -> Iterator[Stored]:
    rows, columns = weight.shape
    yield Stored(f"{layer}.weight_packed", torch.int32, (rows, columns // 8), lambda: packed_words(weight, layer))
    yield Stored(f"{layer}.weight_scale", SCALE_DTYPE, tuple(weight.scales.shape), lambda: exact_scales(weight, layer))
    yield Stored(f"{layer}.weight_shape", torch.int64, (2,), lambda: torch.tensor([rows, columns]))


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
        HalfbyteError: one is negative or not a bf16 number.
    """
    scales = weight.scales.to(SCALE_DTYPE)
    if not torch.equal(scales.float(), weight.scales.float()) or bool((scales < 0).any()):
        raise HalfbyteError(
            f"{where}: scales are not what vLLM computes with, expected bf16 numbers, none negative",
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


def schemes(layers: Mapping[str, LayerPlan]) -> dict[str, list[str]]:
    """Name of a config group -> its layers: one group per activation width and group size."""
    found: dict[str, list[str]] = {}
    for name, entry in layers.items():
        found.setdefault(f"W{entry.w_bits}A{entry.a_bits} g{entry.group_size}", []).append(name)
    return dict(sorted(found.items()))


def quantization_config(layers: Mapping[str, LayerPlan], head: str) -> QuantizationConfig:
    """What ``config.json`` says of the weights and activations."""
    groups: dict[str, QuantizationScheme | list[str]] = {}
    for group, names in schemes(layers).items():
        entry = layers[names[0]]
        scheme = preset_name_to_scheme(f"W{entry.w_bits}A{entry.a_bits}", names)
        assert scheme.weights is not None
        scheme.weights.group_size = entry.group_size
        scheme.format = CompressionFormat.pack_quantized
        groups[group.replace(" ", "_")] = scheme
    return QuantizationConfig(
        config_groups=groups,
        format=CompressionFormat.pack_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[head],
    )


def transform_config(layers: Mapping[str, LayerPlan]) -> TransformConfig | None:
    """What ``config.json`` says of rotations at run time; None if there are none."""
    blocks: dict[int, list[str]] = {}
    for name, entry in layers.items():
        if entry.rotated:
            blocks.setdefault(entry.rotation_block, []).append(name)
    if not blocks:
        return None
    return TransformConfig(
        config_groups={
            f"R4_{block}": TransformScheme(
                type="hadamard", head_dim=block, apply=[TransformArgs(targets=names, location=TransformLocation.INPUT)]
            )
            for block, names in blocks.items()
        }
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


def write_config(folder: Path, source: SourceModel, plan: Plan, *, tied: bool) -> None:
    """Write ``config.json``, the last file: without it nothing loads the folder."""
    config = json.loads(source.config.to_json_string())
    config["architectures"] = config.get("architectures") or [type(source.model).__name__]
    config["tie_word_embeddings"] = tied
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True))
    ModelCompressor(
        quantization_config=quantization_config(plan.layers, source.family.head),
        transform_config=transform_config(plan.layers),
    ).update_config(str(folder))


def check_tensors(folder: Path, entries: Sequence[Stored], codes: Codes) -> None:
    """Read the files back and compare every tensor with what was meant, and some rows of each matrix of codes as the
    library unpacks them with the plan's.

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
                    if not _same(handle.get_tensor(name), expected[name], codes):
                        raise HalfbyteError(f"{where}, {name}: tensor data differs", fix="export again")
                    report("check tensors", len(seen), len(entries), name)
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(f"{where}: written file cannot be read, got {first_line(error)}") from error
    if seen != set(expected):
        raise HalfbyteError(f"{folder}: tensors are missing, got {', '.join(sorted(set(expected) - seen)[:3])}")


def _same(found: torch.Tensor, entry: Stored, codes: Codes) -> bool:
    if (found.dtype, tuple(found.shape)) != (entry.dtype, entry.shape):
        return False
    layer, _, kind = entry.name.rpartition(".")
    if kind == "weight_packed":
        packed = codes.weights[layer].packed[:UNPACKED_ROWS]
        shape = torch.Size((len(packed), 2 * packed.shape[1]))
        if not torch.equal(unpack_from_int32(found[:UNPACKED_ROWS], 4, shape), unpack_int4(packed)):
            return False
    return torch.equal(found, entry.make())
