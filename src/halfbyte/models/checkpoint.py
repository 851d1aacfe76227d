"""The W4 weights of a quantised checkpoint, checked against the model that it was made from, before any work."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from halfbyte.core.errors import HalfbyteError, first_line, reading
from halfbyte.core.files import home_expanded, sha256
from halfbyte.core.progress import report
from halfbyte.core.schema import read_json
from halfbyte.models.checkpoint_format import (
    CheckpointFormat,
    check_order,
    check_symmetric,
    checkpoint_format,
    read_codes,
    read_scales,
)
from halfbyte.models.families import Family
from halfbyte.models.layers import Layer, layers_of
from halfbyte.models.loading import SourceModel, stored_dtype
from halfbyte.models.modules import head_dim, is_tied
from halfbyte.quant.int4 import ANY_FP16, PackedWeight, ScaleRule, check_finite, check_packable

CONFIG, OLD_CONFIG = "config.json", "quantize_config.json"
INDEX = "*.safetensors.index.json"


class QuantisedFolder:
    """Opened, its config understood, nothing of its weights read.

    Attributes:
        path: of the folder.
        format: of the codes.
        config: of the model.
        files: the shards.
    """

    def __init__(self, path: str | Path) -> None:
        """Open it.

        Raises:
            HalfbyteError: no such folder, not a quantised model, a format that cannot be taken over, a shard that is
                missing or corrupt.
        """
        self.path = home_expanded(path)
        if not self.path.is_dir():
            raise HalfbyteError(
                f"--weights_from {path}: no such folder, expected a folder with a quantised checkpoint",
                fix="download it first, with hf download",
            )
        raw = self._json(CONFIG)
        self.format = self._format(raw)
        with reading(self.path / CONFIG, "model configuration"):
            self.config: PretrainedConfig = AutoConfig.from_pretrained(self.path)
        self.files = self._shards()
        self._handles: dict[str, safe_open] = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt")
                names: Iterable[str] = handle.keys()
            except FileNotFoundError as error:
                raise HalfbyteError(f"{file}: shard is missing", fix="download the checkpoint again") from error
            except (SafetensorError, OSError) as error:
                raise HalfbyteError(
                    f"{file}: shard is truncated or corrupt, got {first_line(error)}",
                    fix="download the checkpoint again",
                ) from error
            for name in names:
                if name in self._handles:
                    raise HalfbyteError(f"{file}, {name}: tensor is there twice", fix="keep one of the files")
                self._handles[name] = handle

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_json(path, "file of the checkpoint", fix="download the checkpoint again")

    def _format(self, raw: dict[str, Any]) -> CheckpointFormat:
        if raw.get("quantization_config"):
            return checkpoint_format(raw["quantization_config"], where=self.path / CONFIG)
        if (self.path / OLD_CONFIG).exists():
            return checkpoint_format(self._json(OLD_CONFIG), where=self.path / OLD_CONFIG)
        raise HalfbyteError(
            f"{self.path}: the checkpoint is not quantised, expected quantization_config in config.json",
            fix="leave --weights_from out, or name a compressed-tensors or GPTQ checkpoint",
        )

    def _shards(self) -> list[Path]:
        indices = sorted(self.path.glob(INDEX))
        names = {name for index in indices for name in self._json(index.name).get("weight_map", {}).values()}
        files = sorted(self.path / name for name in names) or sorted(self.path.glob("*.safetensors"))
        if not files:
            raise HalfbyteError(f"{self.path}: no safetensors files", fix="use a checkpoint in safetensors format")
        return files

    @property
    def name(self) -> str:
        """For plans and reports."""
        return self.path.resolve().name

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._handles)

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def shape(self, name: str) -> list[int]:
        """Of a tensor, without reading it."""
        return list(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self.tensor(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file.

        Raises:
            HalfbyteError: it is not there, or cannot be read.
        """
        if name not in self._handles:
            raise HalfbyteError(
                f"{self.path}, {name}: tensor is missing", fix="download the checkpoint again, or use another"
            )
        try:
            return self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(
                f"{self.path}, {name}: tensor cannot be read, got {first_line(error)}",
                fix="download the checkpoint again",
            ) from error

    @cached_property
    def digest(self) -> str:
        """sha256 of the config and of all that is in the shards, whatever their names."""
        parts = [json.dumps(self._json(CONFIG), sort_keys=True), *(sha256(file) for file in self.files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
)
CLOSE = 1e-4  # relative: a GGUF file holds its numbers in fp32
UNUSED = (  # of layers, beside codes: what shapes say too, and scales of activations
    ".weight_shape",
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".rotary_emb.inv_freq",
)


class CheckpointCodes:
    """The codes of a checkpoint and its other parameters, checked: what a plan takes over.

    Attributes:
        folder: where it comes from.
        group_sizes: layer -> weights that share a scale.
        rounded: layer -> scales that are not exact in fp16, or in bf16 where that is asked for.
        parameters: name -> every other parameter of the checkpoint that is not the model's own to the last bit: norms,
            biases, embedding, head.
    """

    def __init__(self, folder: QuantisedFolder, source: SourceModel, rule: ScaleRule = ANY_FP16) -> None:
        """Check everything but the codes themselves.

        Args:
            rule: what scales may be; they are rounded to it.

        Raises:
            HalfbyteError: another architecture, shapes that do not fit, layers that are not quantised, tensors that are
                unknown or missing, codes that are not symmetric or not in groups of columns in a row, scales that fp16
                cannot hold.
        """
        self.folder, self.rule, family = folder, rule, source.family
        self._known: set[str] = set()
        self.group_sizes: dict[str, int] = {}
        self.rounded: dict[str, int] = {}
        _check_architecture(folder, source.config)
        layers = layers_of(source.model, family)
        for layer in layers:  # shapes first: they are quick
            self._check_layer(layer)
        self._check_ends(family)
        self.parameters = self._parameters(source, {f"{layer.name}.weight" for layer in layers})
        self._check_leftovers({layer.name for layer in layers})
        for done, layer in enumerate(layers, start=1):
            self._check_groups(layer)
            report("codes of the checkpoint", done, len(layers), layer.name)

    @property
    def name(self) -> str:
        """For plans and reports."""
        return self.folder.name

    def weight(self, layer: str, in_features: int) -> PackedWeight:
        """The codes of a layer, and its scales in fp16."""
        layout = self.folder.format.layout
        packed = read_codes(layout, self.folder.tensor(f"{layer}.{layout.codes}"), in_features)
        return PackedWeight(packed, self._scales(layer)[0])

    def note(self, layer: str, group_size: int) -> str:
        """What of a layer is not as asked: empty, or its group size, and scales that were rounded."""
        own, rounded, notes = self.group_sizes[layer], self.rounded[layer], []
        if own != group_size:
            notes.append(f"group {own}: as in {self.name}, not {group_size}")
        if rounded:
            kind = "bf16" if self.rule.bf16 else "fp16"
            notes.append(f"{rounded} scales of {self.name} are not exact in {kind} and were rounded")
        return "; ".join(notes)

    def record(self) -> dict[str, Any]:
        """For the plan."""
        return {
            "name": self.name,
            "format": self.folder.format.layout.name,
            "sha256": self.folder.digest,
            "parameters": len(self.parameters),
            "rounded_scales": sum(self.rounded.values()),
            "notes": list(self.folder.format.notes),
        }

    def _where(self, name: str) -> str:
        return f"{self.folder.path}, {name}"

    def _scales(self, layer: str) -> tuple[torch.Tensor, int]:
        layout = self.folder.format.layout
        return read_scales(layout, self.folder.tensor(f"{layer}.{layout.scales}"), self.rule, where=self._where(layer))

    def _check_layer(self, layer: Layer) -> None:
        """Whether its tensors are there, and of the right shape."""
        layout, folder = self.folder.format.layout, self.folder
        names = {part: f"{layer.name}.{getattr(layout, part)}" for part in ("codes", "scales", "zeros", "order")}
        if names["codes"] not in folder and f"{layer.name}.weight" in folder:
            raise HalfbyteError(
                f"{self._where(layer.name)}: layer is not quantised, expected int4 codes, got float weights",
                fix="use a checkpoint that quantises every linear layer of the blocks",
            )
        check_packable(layer.in_features, where=layer.name)
        needed = {"codes", "scales"} | ({"zeros"} if layout.needs_zeros else set())
        needed |= {"order"} if folder.format.needs_order else set()
        for part, name in names.items():
            if name not in folder and part in needed:
                folder.tensor(name)  # says that it is missing
        rows, columns = layer.out_features, layer.in_features
        self._check_shape(names["codes"], layout.codes_shape(rows, columns), torch.int32)
        stored = folder.shape(names["scales"])
        groups = stored[0 if layout.inputs_first else -1] if stored else 0
        size = columns // groups if groups else 0
        if not groups or columns % groups or size not in folder.format.group_sizes:
            expected = " or ".join(f"{columns / own:g} groups of {own}" for own in folder.format.group_sizes)
            raise HalfbyteError(
                f"{self._where(names['scales'])}: groups do not divide the inputs, expected {expected}, "
                f"got {groups} scales per output for {columns} inputs",
                fix="use a checkpoint whose group size divides every layer",
            )
        self._check_shape(names["scales"], layout.scales_shape(rows, groups))
        self.group_sizes[layer.name] = size
        self._known |= {name for name in names.values() if name in folder}

    def _check_shape(self, name: str, expected: list[int], dtype: torch.dtype | None = None) -> None:
        if self.folder.shape(name) != expected:
            raise HalfbyteError(
                f"{self._where(name)}: does not fit the model, expected {expected}, got {self.folder.shape(name)}",
                fix="name the model that the checkpoint was made from with --model_id; codes must have 4 bits",
            )
        if dtype is not None and self.folder.dtype(name) != dtype:
            raise HalfbyteError(
                f"{self._where(name)}: codes are packed otherwise, expected {dtype}, got {self.folder.dtype(name)}"
            )

    def _check_groups(self, layer: Layer) -> None:
        """What only the tensors say, but for the codes: any four bits are a code."""
        layout, folder, where = self.folder.format.layout, self.folder, self._where(layer.name)
        if (zeros := f"{layer.name}.{layout.zeros}") in folder:
            check_symmetric(layout, folder.tensor(zeros), where=where)
        if (order := f"{layer.name}.{layout.order}") in folder:
            self._check_shape(order, [layer.in_features])
            check_order(folder.tensor(order), self.group_sizes[layer.name], where=where)
        self.rounded[layer.name] = self._scales(layer.name)[1]

    def _check_ends(self, family: Family) -> None:
        for part in (family.embedding, family.head):
            if f"{part}.{self.folder.format.layout.codes}" in self.folder:
                raise HalfbyteError(
                    f"{self._where(part)}: embedding and head cannot be taken over as codes, expected floats, "
                    "got int4 codes",
                    fix="use a checkpoint that leaves them alone",
                )

    def _parameters(self, source: SourceModel, weights: set[str]) -> dict[str, torch.Tensor]:
        """Everything that has no codes, and differs from what the model has.

        A tied head and its embedding are there both, or neither: alone, one would leave the other behind.
        """
        folder, family = self.folder, source.family
        embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
        lossless = source.dtype in (torch.float32, stored_dtype(source.origin))
        found, differing = {}, set()
        for name, own in source.model.named_parameters(remove_duplicate=False):
            if name in weights:
                continue
            stored = embedding if name == head and head not in folder and folder.config.tie_word_embeddings else name
            value = folder.tensor(stored)
            self._known.add(stored)
            self._check_shape(stored, list(own.shape))
            check_finite(value, self._where(stored), "values are")
            found[name] = value.float() if value.ndim == 1 else value
            if not lossless or not torch.equal(value.to(own.device).float(), own.float()):
                differing.add(name)
        if is_tied(source.model, family) and {embedding, head} & differing:
            differing |= {embedding, head}
            if found[head].data_ptr() == found[embedding].data_ptr():
                found[head] = found[head].clone()  # a file cannot hold one tensor under two names
        return {name: value for name, value in found.items() if name in differing}

    def _check_leftovers(self, layers: set[str]) -> None:
        for name in self.folder.names():
            module, _, leaf = name.rpartition(".")
            if name in self._known or name.endswith(UNUSED):
                continue
            if leaf == "bias" and module in layers and not bool(self.folder.tensor(name).any()):
                continue  # old tools store zeros for biases that there are not
            raise HalfbyteError(
                f"{self._where(name)}: tensor is unknown to the model",
                fix="name the model that the checkpoint was made from with --model_id",
            )


def _check_architecture(folder: QuantisedFolder, config: PretrainedConfig) -> None:
    ours, theirs = _described(config), _described(folder.config)
    for key, expected in ours.items():
        got = theirs.get(key)
        same = got == expected
        if isinstance(expected, float) and isinstance(got, float | int):
            same = math.isclose(got, expected, rel_tol=CLOSE)
        if not same:
            raise HalfbyteError(
                f"{folder.path}, {key}: the checkpoint is of another model, expected {expected}, got {got}",
                fix="name the model that it was made from with --model_id",
            )


def _described(config: PretrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        **{key: getattr(config, key, None) for key in SIZES},
        "head_dim": head_dim(config),
        **{f"rope_parameters.{key}": value for key, value in rope.items()},
    }
