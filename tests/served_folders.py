"""Tiny compressed-tensors folders: real int4 codes of a tiny model, and headers only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from halfbyte.quant.int4 import absmax_scales, encode_with_scales


def pack_int32(codes: torch.Tensor) -> torch.Tensor:  # int8 [out, in] -> int32 [out, in / 8]
    """Eight codes to a word, the first one lowest, each plus 8 (compressed-tensors ``pack-quantized``)."""
    rows, width = codes.shape
    words = ((codes.to(torch.int64) + 8).view(rows, width // 8, 8) << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def groups_of(targets: Mapping[int, Sequence[str]], group_size: int = 128, **inputs: Any) -> dict[str, Any]:
    """Config groups: activation bits (16: none) -> targets."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    usual = {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        f"group_{index}": {
            "targets": list(named),
            "weights": {**weights, "dynamic": False},
            "input_activations": None if bits == 16 else {"num_bits": bits, **usual, **inputs},
        }
        for index, (bits, named) in enumerate(targets.items())
    }


def quantisation(groups: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A ``quantization_config``."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": dict(groups),
        **changes,
    }


def quantise_folder(source: Path, target: Path, groups: Mapping[str, Any], group_size: int = 128) -> None:
    """``source`` with the codes of its linear layers rounded to nearest, as ``target``; in bf16 beside them."""
    target.mkdir(parents=True)
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            scales = absmax_scales(value, group_size)
            tensors[f"{module}.weight_packed"] = pack_int32(encode_with_scales(value, scales).codes)
            tensors[f"{module}.weight_scale"] = scales
            tensors[f"{module}.weight_shape"] = torch.tensor(value.shape)
        else:
            tensors[name] = value.to(torch.bfloat16).contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "bfloat16", "quantization_config": quantisation(groups)}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def header_folder(path: Path, groups: Mapping[str, Any], *, blocks: int = 2, **changes: Any) -> Path:
    """A folder with empty-handed shards of a model with two heads of 128: enough for what only reads headers."""
    path.mkdir(parents=True)
    shapes = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256)}
    mlp = {"gate": (512, 256), "up": (512, 256), "down": (256, 512)}
    tensors = {"model.embed_tokens.weight": torch.zeros(8, 256), "lm_head.weight": torch.zeros(8, 256)}
    for block in range(blocks):
        for part, sizes in (("self_attn", shapes), ("mlp", mlp)):
            for kind, (rows, width) in sizes.items():
                module = f"model.layers.{block}.{part}.{kind}_proj"
                tensors[f"{module}.weight_packed"] = torch.zeros(rows, width // 8, dtype=torch.int32)
                tensors[f"{module}.weight_scale"] = torch.zeros(rows, width // 128)
    save_file(tensors, path / "model.safetensors")
    config = {"dtype": "bfloat16", "num_attention_heads": 2, "num_key_value_heads": 1}
    config["quantization_config"] = quantisation(groups, **changes)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")
    return path
