"""What a compressed-tensors folder says about each of its layers, and what is wrong with what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.families import DOWN, GATE_UP, OUT, QKV
from halfbyte.targets.served.rules import Stored

PACKED = "pack-quantized"
# What vLLM multiplies as one module -> its parts, which need one scheme.
FUSED = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP}
PARTS = (*QKV, *OUT, *GATE_UP, *DOWN)


@dataclass(frozen=True)
class ServedLayer:
    """One int4 matrix of the folder.

    Attributes:
        name: module path, e.g. ``model.layers.3.mlp.down_proj``.
        module: what vLLM multiplies it as, e.g. ``model.layers.3.mlp.gate_up_proj``; else its own name.
        group: name of its config group.
        w_bits, a_bits: 16 where not rounded.
        group_size: weights per scale; 0 is one scale per row.
        in_features, out_features: its own shape is ``[out_features, in_features]``.
    """

    name: str
    module: str
    group: str
    w_bits: int
    a_bits: int
    group_size: int
    in_features: int
    out_features: int

    @property
    def scheme(self) -> str:
        """``W4A8 g128``."""
        return f"W{self.w_bits}A{self.a_bits}" + (f" g{self.group_size}" if self.group_size else "")


@dataclass(frozen=True)
class ServedFolder:
    """What ``config.json`` and the headers of the shards say.

    Attributes:
        path: the folder.
        config: ``config.json``.
        layers: the int4 layers, in the order of the forward pass.
        unquantised: other matrices, e.g. ``lm_head``.
        problems: what an engine would do otherwise than the folder says, or not at all.
    """

    path: Path
    config: Mapping[str, Any]
    layers: tuple[ServedLayer, ...]
    unquantised: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def quantisation(self) -> Mapping[str, Any]:
        """``quantization_config``."""
        return self.config["quantization_config"]

    @property
    def transforms(self) -> tuple[str, ...]:
        """Names of the transforms at run time."""
        return tuple((self.quantisation.get("transform_config") or {}).get("config_groups", {}))

    def stored(self, layer: ServedLayer) -> Stored:
        """``layer`` as an engine sees it: with the outputs of what is multiplied together with it, and their scheme."""
        together = [other for other in self.layers if other.module == layer.module]
        said = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        dtype = "float16" if said == "float16" else "bfloat16"  # fp32 checkpoints too run in bf16 (``--dtype auto``)
        return Stored(
            together[0].a_bits, layer.group_size, layer.in_features, sum(part.out_features for part in together), dtype
        )


def read_served(path: str | Path) -> ServedFolder:
    """Read a folder's config and the headers of its shards; no weights.

    Raises:
        HalfbyteError: no such folder, no config, another quantisation method or format, no shards, or a damaged one.
    """
    path = Path(path)
    config = _config(path)
    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, Mapping):
        raise HalfbyteError(f"{path / 'config.json'}: model is not quantised, expected a quantization_config")
    if (method := quantisation.get("quant_method")) != "compressed-tensors":
        raise HalfbyteError(
            f"{path / 'config.json'}: another quantisation method, expected compressed-tensors, got {method}"
        )
    shapes = _shapes(path)
    layers, problems = [], list(_problems(config, quantisation, shapes))
    for name in sorted(_modules(shapes, "weight_packed"), key=_order):
        found = _scheme(name, quantisation)
        if found is None:
            problems.append(f"{name} is stored in int4, but no config group names it: it cannot be loaded")
            continue
        group, scheme = found
        bits = (scheme.get("weights") or {}).get("num_bits", 16)
        inputs = scheme.get("input_activations") or {}
        problems += _input_problems(group, inputs)
        rows, words = shapes[f"{name}.weight_packed"]
        layers.append(
            ServedLayer(
                name,
                _module(name),
                group,
                bits,
                inputs.get("num_bits", 16),
                (scheme.get("weights") or {}).get("group_size") or 0,
                words * 32 // bits,
                rows,
            )
        )
    plain = [name for name in _modules(shapes, "weight") if len(shapes[f"{name}.weight"]) == 2]
    for name in plain:
        if name.endswith("_proj") and _scheme(name, quantisation):
            problems.append(f"{name} is not quantised, but a config group names it: it cannot be loaded")
    problems += _fused_problems(layers)
    unquantised = tuple(sorted((name for name in plain if "embed" not in name), key=_natural))
    return ServedFolder(path, config, tuple(layers), unquantised, tuple(dict.fromkeys(problems)))


def matches(target: str, name: str, kind: str = "Linear") -> bool:
    """Whether a ``targets`` or ``ignore`` entry means the module ``name`` of class ``kind`` (compressed-tensors)."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, kind)


def _scheme(name: str, quantisation: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The config group of a layer: one that names it, exactly or by pattern, goes before one that names its class."""
    if any(matches(entry, name) for entry in quantisation.get("ignore") or ()):
        return None
    groups = quantisation.get("config_groups", {})
    for kind in ("", "Linear"):
        for group, scheme in groups.items():
            if any(matches(target, name, kind) for target in scheme.get("targets") or ()):
                return group, scheme
    return None


def _config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise HalfbyteError(f"{path}: no such folder, expected a folder with config.json and safetensors files")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HalfbyteError(f"{path}: no config.json, expected a model folder") from error
    except ValueError as error:
        raise HalfbyteError(f"{path}: config.json is damaged, got {error}") from error
    return config


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise HalfbyteError(f"{path}: no safetensors files")
    shapes = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as handle:
                shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise HalfbyteError(f"{shard}: shard is damaged, got {error}", fix="export it again") from error
    return shapes


def _modules(shapes: Iterable[str], leaf: str) -> list[str]:
    return [name[: -len(leaf) - 1] for name in shapes if name.endswith("." + leaf)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _order(name: str) -> tuple[list[tuple[int, str]], int]:
    """Blocks by number, then the layers of a block in the order of its forward pass."""
    for index, part in enumerate(PARTS):
        if name.endswith("." + part):
            return _natural(name[: -len(part) - 1]), index
    return _natural(name), len(PARTS)


def _module(name: str) -> str:
    for module, parts in FUSED.items():
        for part in parts:
            if name.endswith("." + part):
                return name[: -len(part)] + module
    return name


def _problems(config: Mapping[str, Any], quantisation: Mapping[str, Any], shapes: Mapping[str, Any]) -> Iterable[str]:
    """What is wrong with the folder as a whole."""
    formats = {quantisation.get("format"), *(g.get("format") for g in quantisation.get("config_groups", {}).values())}
    for other in sorted(formats - {PACKED, None}):
        yield f"format {other}: what is said here holds for {PACKED} only"
    if quantisation.get("quantization_status") != "compressed":
        yield "quantization_status is not compressed: transformers quantises the weights again"
    if config.get("tie_word_embeddings") and "model.embed_tokens.weight" not in shapes:
        yield "the embedding is not in the file: vLLM answers nonsense without a word"
    if (quantisation.get("transform_config") or {}).get("config_groups"):
        yield (
            "transforms at run time: vLLM runs them on one GPU only (no tensor parallelism, no CPU) and not in front "
            "of a layer with a bias; transformers ignores them unless they are applied by hand"
        )


def _input_problems(group: str, inputs: Mapping[str, Any]) -> Iterable[str]:
    """What vLLM refuses about a group's activations."""
    if not inputs:
        return
    if not inputs.get("symmetric", True):
        yield f"{group}: asymmetric activations: vLLM refuses the folder"
    if not inputs.get("dynamic"):
        yield f"{group}: activations with fixed scales: vLLM refuses the folder"
    if inputs.get("type", "int") != "int" or inputs.get("num_bits") not in (4, 8):
        yield f"{group}: {inputs.get('type')}{inputs.get('num_bits')} activations: what is said here does not hold"


def _fused_problems(layers: Iterable[ServedLayer]) -> Iterable[str]:
    """Parts of one fused module that differ: vLLM asks the first part only."""
    parts: dict[str, list[ServedLayer]] = {}
    for layer in layers:
        parts.setdefault(layer.module, []).append(layer)
    for module, members in parts.items():
        if len({(member.w_bits, member.a_bits, member.group_size) for member in members}) > 1:
            kinds = ", ".join(f"{member.name.rpartition('.')[2]} {member.scheme}" for member in members)
            first = members[0].name.rpartition(".")[2]
            yield f"{module}: {kinds}: vLLM gives all of them the scheme of {first} without a word"


def tensor_parallel_sizes(folder: ServedFolder, most: int = 8) -> tuple[int, ...]:
    """How many GPUs the layers can be spread over: heads, and whole groups of weights, must divide.

    The rows of o_proj and down_proj are what each GPU holds a part of (vLLM ``RowParallelLinear``); a group of weights
    that shares a scale is not divided.
    """
    config = folder.config
    heads = config.get("num_attention_heads") or 1
    key_value_heads = config.get("num_key_value_heads") or heads
    cut = [layer for layer in folder.layers if layer.name.endswith((".o_proj", ".down_proj"))]

    def fits(size: int) -> bool:
        if heads % size or max(size, key_value_heads) % min(size, key_value_heads):
            return False
        return all(layer.in_features % (size * max(layer.group_size, 1)) == 0 for layer in cut)

    return tuple(size for size in range(1, most + 1) if fits(size) and (size == 1 or not folder.transforms))
