"""The W4 weights of a quantised checkpoint, checked against the model that it was made from, before any work."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PretrainedConfig

from halfbyte.errors import HalfbyteError
from halfbyte.formats.checkpoint_codes import check_order, check_symmetric, read_codes, read_scales
from halfbyte.formats.int_group import ANY_FP16, PackedWeight, ScaleRule, check_finite, check_packable
from halfbyte.models.archs import Family
from halfbyte.models.loading import SourceModel, layers_of, stored_dtype
from halfbyte.models.modules import head_dim, is_tied
from halfbyte.models.quantised_folder import QuantisedFolder
from halfbyte.progress import Progress, Reporter, silent
from halfbyte.spec import Layer

SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps",
)  # fmt: skip
CLOSE = 1e-4  # relative: a GGUF file holds its numbers in fp32
UNUSED = (  # of layers, beside codes: what shapes say too, and scales of activations
    ".weight_shape", ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
    ".k_scale", ".v_scale", ".rotary_emb.inv_freq",
)  # fmt: skip


class GivenCodes:
    """What a plan takes over from a checkpoint.

    Attributes:
        folder: where it comes from.
        group_sizes: layer -> weights that share a scale.
        rounded: layer -> scales that are not exact in fp16, or in bf16 where that is asked for.
        parameters: name -> every other parameter of the checkpoint that is not the model's own to the last bit: norms,
            biases, embedding, head.
    """

    def __init__(
        self, folder: QuantisedFolder, source: SourceModel, report: Reporter = silent, rule: ScaleRule = ANY_FP16
    ) -> None:
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
            report(Progress("codes of the checkpoint", done, len(layers), layer.name))

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
            "name": self.name, "format": self.folder.format.layout.name, "sha256": self.folder.digest,
            "parameters": len(self.parameters), "rounded_scales": sum(self.rounded.values()),
            "notes": list(self.folder.format.notes),
        }  # fmt: skip

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
                "layer is not quantised", where=self._where(layer.name), expected="int4 codes", got="float weights",
                fix="use a checkpoint that quantises every linear layer of the blocks",
            )  # fmt: skip
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
                "groups do not divide the inputs", where=self._where(names["scales"]), expected=expected,
                got=f"{groups} scales per output for {columns} inputs",
                fix="use a checkpoint whose group size divides every layer",
            )  # fmt: skip
        self._check_shape(names["scales"], layout.scales_shape(rows, groups))
        self.group_sizes[layer.name] = size
        self._known |= {name for name in names.values() if name in folder}

    def _check_shape(self, name: str, expected: list[int], dtype: torch.dtype | None = None) -> None:
        if self.folder.shape(name) != expected:
            raise HalfbyteError(
                "does not fit the model", where=self._where(name), expected=expected, got=self.folder.shape(name),
                fix="name the model that the checkpoint was made from with --model_id; codes must have 4 bits",
            )  # fmt: skip
        if dtype is not None and self.folder.dtype(name) != dtype:
            raise HalfbyteError(
                "codes are packed otherwise", where=self._where(name), expected=dtype, got=self.folder.dtype(name)
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
                    "embedding and head cannot be taken over as codes", where=self._where(part), expected="floats",
                    got="int4 codes", fix="use a checkpoint that leaves them alone",
                )  # fmt: skip

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
                "tensor is unknown to the model", where=self._where(name),
                fix="name the model that the checkpoint was made from with --model_id",
            )  # fmt: skip


def _check_architecture(folder: QuantisedFolder, config: PretrainedConfig) -> None:
    ours, theirs = _described(config), _described(folder.config)
    for key, expected in ours.items():
        got = theirs.get(key)
        same = got == expected
        if isinstance(expected, float) and isinstance(got, float | int):
            same = math.isclose(got, expected, rel_tol=CLOSE)
        if not same:
            raise HalfbyteError(
                "the checkpoint is of another model", where=f"{folder.path}, {key}", expected=expected, got=got,
                fix="name the model that it was made from with --model_id",
            )  # fmt: skip


def _described(config: PretrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        **{key: getattr(config, key, None) for key in SIZES},
        "head_dim": head_dim(config),
        **{f"rope_parameters.{key}": value for key, value in rope.items()},
    }
