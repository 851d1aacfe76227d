"""KL of a folder that ``halfbyte export vllm`` wrote for Turing to Ada, in Humming's kernels and in the simulation.

    python benchmarks/humming_folder.py --folder DIR --model MODEL [--windows 8] [--ctx 512] [--json OUT]

On one Nvidia GPU, without vLLM; see ``humming_check.py``. A4 units get their codes from Humming's own int4 kernel and
their product from the int8 one, which is how they run on any GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Row, arguments, load_model, parse, run
from humming_check import Kernel, checked, config_of, fused_name, their_codes
from safetensors.torch import load_file
from torch import nn

from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import Quality, live, measure, model_logits
from halfbyte.models.modules import blocks
from halfbyte.quant.int4 import PackedWeight
from halfbyte.quant.quant_linear import (
    InputScheme,
    SharedInput,
    replace_linear_,
    set_activation_bits_,
    set_parameters_,
)
from halfbyte.targets.vllm_files.tensors import OFFSET


class Fused:
    """A unit of a folder in Humming's kernels; the layers ask one after the other for their part of one product."""

    def __init__(self, kernel: Kernel, bits: int, scheme: InputScheme) -> None:
        self.kernel, self.bits, self.scheme = kernel, bits, scheme
        self._source: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """All outputs for ``x`` ``[..., in]``."""
        if self._source is not x or self._result is None:
            flat = x.reshape(-1, x.shape[-1])
            codes = their_codes(flat, self.scheme, 4) if self.bits == 4 else (flat,)
            self._source, self._result = x, self.kernel(*codes).view(*x.shape[:-1], -1)
        return self._result


class Part(nn.Module):
    """One layer of a unit."""

    def __init__(self, unit: Fused, rows: slice) -> None:
        super().__init__()
        self.unit, self.rows = unit, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        """Its part of the unit's product."""
        return self.unit.product(x)[..., self.rows]


def _put_kernels_(model: nn.Module, units: Sequence[Sequence[str]], tensors: Mapping[str, Any], config: Row) -> None:
    for names in units:
        own = config_of(config, fused_name(names[0]))
        kinds = [kind for kind in ("weight", "weight_scale", "bias") if f"{names[0]}.{kind}" in tensors]
        stacked = {kind: torch.cat([tensors[f"{name}.{kind}"] for name in names]).cuda() for kind in kinds}
        if "bias" in stacked:
            stacked["bias"] = stacked["bias"].to(torch.bfloat16)
        kernel, bits = Kernel({**own, "a_dtype": "int8"}, stacked), int(own["a_dtype"].removeprefix("int"))
        fused, start = Fused(kernel, bits, scheme_of(own)), 0
        for name in names:
            rows = tensors[f"{name}.weight"].shape[0]
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Part(fused, slice(start, start + rows)))
            start += rows


def scheme_of(config: Mapping[str, Any]) -> InputScheme:
    """What a folder's config says of a unit's input."""
    block, group = config["hadamard_block_size"], config["input_scale_group_size"]
    return InputScheme(rotated=block > 0, block=block, arithmetic="humming", group=group)


def _simulate_(model: nn.Module, units: Sequence[Sequence[str]], tensors: Mapping[str, Any], config: Row) -> None:
    shared, bits = SharedInput(), {}
    for names in units:
        own = config_of(config, fused_name(names[0]))
        scheme = scheme_of(own)
        for name in names:
            packed = tensors[f"{name}.weight"].contiguous().view(torch.uint8) ^ OFFSET
            weight = PackedWeight(packed, tensors[f"{name}.weight_scale"].to(torch.float16))
            replace_linear_(model, name, weight, shared, scheme)
            bits[name] = int(own["a_dtype"].removeprefix("int"))
    set_activation_bits_(model, bits)


def check_folder(options: Any) -> Iterable[Row]:
    """KL to the original, and between kernels and simulation."""
    folder = Path(options.folder or "")
    if not options.folder or not (folder / "config.json").exists():
        raise HalfbyteError(f"--folder: no folder of halfbyte export vllm, got {options.folder}")
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {**written["quantization_config"], **json.loads(options.config)}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    at = load_model(options.model, options.text)
    source, family = at.source, at.source.family
    windows = at.windows("eval", options.ctx, options.windows).tolist()
    model = source.model.to("cuda")
    original = list(live(windows, model_logits(model)))

    def row(name: str, logits: list[torch.Tensor], reference: list[torch.Tensor], expected: float | None = None) -> Row:
        quality: Quality = measure(windows, iter(logits), iter(reference))
        kl, error = quality.kld_mean or 0.0, quality.kld_error or 0.0
        return {
            "part": 1,
            "case": name,
            "kl": kl,
            "kl_error": error,
            "same_top": quality.top1_agreement,
            "ppl": quality.ppl,
            "ok": expected is None or abs(kl - expected) <= 2 * error,
        }

    layers = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    own = {
        name: value
        for name, value in tensors.items()
        if not name.endswith(".weight_scale") and name.removesuffix(".weight") not in layers
    }
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if written["tie_word_embeddings"] and embedding in own:
        own[head] = own[embedding]
    set_parameters_(model, own)
    counted = range(len(list(blocks(model, family))))
    units = [[f"{family.blocks}.{index}.{part}" for part in group] for index in counted for group in family.groups]
    _simulate_(model, units, tensors, config)
    exact = list(live(windows, model_logits(model)))
    yield row("simulated in fp32, to the original", exact, original)
    for parameter in model.parameters():  # buffers, such as the frequencies of rotary embeddings, stay fp32
        parameter.data = parameter.data.to(torch.bfloat16)
    simulated = list(live(windows, model_logits(model)))
    expected = row("simulated in bf16, to the original", simulated, original)
    yield expected
    _put_kernels_(model, units, tensors, config)
    found = list(live(windows, model_logits(model)))
    yield row("in Humming's kernels, bf16, to the original", found, original, expected["kl"])
    yield row("in Humming's kernels, to the simulation in fp32", found, exact)
    yield row("simulated in bf16, to the simulation in fp32", simulated, exact)


def main() -> int:
    """The rows; 1 if the KL in the kernels is not that of the simulation."""
    parser = arguments(__doc__, device=False, text="pydoc")
    parser.add_argument("--folder", help="whose KL is measured; --model is what it was made from")
    parser.add_argument("--config", default="{}", help="JSON that changes the folder's quantization_config")
    parser.add_argument("--windows", type=int, default=8, help="of text")
    parser.add_argument("--ctx", type=int, default=512, help="tokens in a window")
    return checked(parse(parser), {1: check_folder}, {})


if __name__ == "__main__":
    run(main)
