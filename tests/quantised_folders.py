"""Quantised checkpoints as other tools write them: GPTQ's format from its description, the other by its own library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]


class Checkpoint:
    """A model with float weights, and its linears rounded to int4.

    Args:
        dtype, rest: of scales, and of what has no codes.

    Attributes:
        model: in fp32; may be changed before :meth:`write`.
        codes, scales: after :meth:`write`, layer -> int8 ``[out, in]`` and the scales as stored ``[out, groups]``.
    """

    def __init__(
        self,
        original: str | Path,
        group_size: int = 32,
        dtype: torch.dtype = torch.float16,
        rest: torch.dtype = torch.float32,
    ) -> None:
        self.original, self.group_size, self.dtype, self.rest = original, group_size, dtype, rest
        self.model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
        self.codes: Tensors = {}
        self.scales: Tensors = {}

    def layers(self) -> list[str]:
        return [name for name, part in self.model.named_modules() if ".layers." in name and hasattr(part, "bias")]

    def decoded(self, layer: str) -> torch.Tensor:
        steps = self.scales[layer].to(torch.float16).float().repeat_interleave(self.group_size, dim=1)
        return self.codes[layer].float() * steps

    def write(
        self,
        folder: Path,
        pack: Callable[[Checkpoint, str], Tensors],
        config: dict[str, Any],
        *,
        change: Callable[[Tensors], None] = lambda _: None,
        old_config: bool = False,
        shards: int = 1,
    ) -> Path:
        """Write it; ``change`` edits the tensors first."""
        shutil.copytree(self.original, folder)
        for known in folder.glob("*.safetensors*"):
            known.unlink()
        tensors = {name: value.to(self.rest) for name, value in self.model.state_dict().items()}
        for layer in self.layers():
            weight = tensors.pop(f"{layer}.weight").float()
            grouped = weight.view(len(weight), -1, self.group_size)
            self.scales[layer] = (grouped.abs().amax(-1) / 7).to(self.dtype)
            codes = (grouped / self.scales[layer].float()[..., None]).round().clamp(-8, 7)
            self.codes[layer] = codes.view_as(weight).to(torch.int8)
            tensors |= {f"{layer}.{name}": value for name, value in pack(self, layer).items()}
        tied = self.model.config.tie_word_embeddings
        if tied:
            del tensors["lm_head.weight"]
        change(tensors)
        described = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": tied}
        if old_config:
            (folder / "quantize_config.json").write_text(json.dumps(config))
        else:
            described["quantization_config"] = config
        (folder / "config.json").write_text(json.dumps(described))
        _save(folder, tensors, shards)
        return folder


def _save(folder: Path, tensors: Tensors, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {name: f"part-{at % shards}.safetensors" for at, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def edited(folder: Path, change: Callable[[Tensors], None]) -> Path:
    """The same checkpoint, in place, with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def words(rows: Iterable[Iterable[int]]) -> torch.Tensor:
    """Rows of 4-bit numbers as int32: eight to a word, the first one lowest."""
    packed = []
    for row in rows:
        numbers = list(row)
        parts = [numbers[at : at + 8] for at in range(0, len(numbers), 8)]
        values = [sum(number << 4 * place for place, number in enumerate(part)) for part in parts]
        packed.append([value - 2**32 if value >= 2**31 else value for value in values])
    return torch.tensor(packed, dtype=torch.int32)


def gptq(version: int = 1, order: torch.Tensor | None = None) -> Callable[[Checkpoint, str], Tensors]:
    """``scale · (number − zero point)`` with the zero point 8; version 1 stores zero points less one."""

    def pack(made: Checkpoint, layer: str) -> Tensors:
        codes, scales = made.codes[layer], made.scales[layer]
        outputs, inputs = codes.shape
        zero = 8 - (version == 1)
        return {
            "qweight": words((codes + 8).tolist()).T.contiguous(),  # [in / 8, out]
            "qzeros": words([[zero] * outputs] * scales.shape[1]),  # [groups, out / 8]
            "scales": scales.T.contiguous(),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // made.group_size if order is None else order[:inputs],
        }

    return pack


def gptq_config(group_size: int = 32, **changes: Any) -> dict[str, Any]:
    known = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True, "desc_act": False}
    return {**known, **changes}


def scheme(activations: int | None = None, **weights: Any) -> QuantizationScheme:
    known = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    inputs = None
    if activations:
        inputs = QuantizationArgs(num_bits=activations, type="int", symmetric=True, strategy="token", dynamic=True)
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**{**known, **weights}), input_activations=inputs
    )


def compressed(made: Checkpoint, layer: str) -> Tensors:
    """Packed by the library from weights that are exactly on the grid."""
    scales = made.scales[layer]
    weight = made.codes[layer].float() * scales.float().repeat_interleave(made.group_size, dim=1)
    state = {"weight": weight, "weight_scale": scales}
    return PackedQuantizationCompressor.compress(state, scheme(group_size=made.group_size))


def compressed_config(*groups: QuantizationScheme, **changes: Any) -> dict[str, Any]:
    named = {f"group_{index}": group for index, group in enumerate(groups or [scheme()])}
    config = QuantizationConfig(
        config_groups=named, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    )
    return {**json.loads(config.model_dump_json()), **changes}
