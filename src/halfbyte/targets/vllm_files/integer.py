"""Turing to Ada: integer A4 and A8 in vLLM's Humming kernels, with block Hadamard rotations in front of every layer.

The folder is vLLM's own ``humming`` format (vLLM 0.33, ``quantization/humming.py``): per layer ``weight`` int32
``[out, in / 8]``, codes + 8, the lowest nibble first, and ``weight_scale`` ``[out, in / group]``. With
``allow_fallback: false`` the engine computes what the folder asks for, or refuses it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import Unit
from halfbyte.options import SearchOptions
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.int4 import ScaleRule
from halfbyte.targets.vllm_files.gpu import GPUTarget
from halfbyte.targets.vllm_files.tensors import Stored, exact_scales, packed_words

if TYPE_CHECKING:
    from halfbyte.models.loading import SourceModel
    from halfbyte.plan import LayerPlan, Plan
    from halfbyte.quant.int4 import PackedWeight

A4_GROUP = 64  # int4 activations want groups of weights of at least this many
LARGEST_HADAMARD = 512
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class Integer(GPUTarget):
    """Integer activations, in groups as large as those of the weights."""

    capabilities = (75, 80, 86, 87, 89)
    engine = "0.33"
    packed_name = "weight"
    tags = ("humming",)
    recipe: ClassVar = Recipe(
        clip=False,
        scale_rule=ScaleRule(bf16=True),
        arithmetic="humming",
        input_groups=True,
        rotation_block=LARGEST_HADAMARD,
        ends_as_stored=True,
    )
    runs_online: ClassVar = frozenset({"online"})

    def rotations(self, *, tied: bool) -> tuple[str, ...]:
        return ("online",)

    def widths(self, unit: Unit) -> tuple[int, ...]:
        inputs, _ = self.share(unit)
        return (4, 8) if inputs % A4_GROUP == 0 else (8,)

    def check_options(self, options: SearchOptions) -> None:
        super().check_options(options)
        if options.group_size % A4_GROUP:
            raise HalfbyteError(
                f"--group_size: int4 activations want weights in groups of {A4_GROUP} or a multiple, "
                f"got {options.group_size}"
            )

    def group(self, entry: LayerPlan) -> str:
        turned = f", Hadamard {entry.rotation_block}" if entry.rotated else ""
        return f"int4 g{entry.group_size}, A{entry.a_bits}{turned}"

    def weights(self, layer: str, weight: PackedWeight) -> list[Stored]:
        rows, columns = weight.shape
        return [
            Stored(f"{layer}.weight", torch.int32, (rows, columns // 8), lambda: packed_words(weight, layer)),
            Stored(
                f"{layer}.weight_scale",
                torch.bfloat16,
                tuple(weight.scales.shape),
                lambda: exact_scales(weight, layer),
            ),
        ]

    def quantization_config(self, source: SourceModel, plan: Plan) -> dict[str, Any]:
        modules: dict[str, dict[str, Any]] = {}
        for name, entry in plan.layers.items():
            prefix, _, kind = name.rpartition(".")
            fused = f"{prefix}.{FUSED.get(kind, kind)}"
            modules[f"+:^{re.escape(fused)}$"] = {
                "a_dtype": f"int{entry.a_bits}",
                "weight_scale_group_size": entry.group_size,
                "input_scale_group_size": entry.a_group,
                "hadamard_block_size": entry.rotation_block if entry.rotated else 0,
            }
        return {
            "quant_method": "humming",
            "b_dtype": "int4",
            "input_quant_mode": "dynamic_group",
            "allow_fallback": False,
            "ignore": [source.family.head],
            "dynamic": modules,
        }

    def unpack(self, words: torch.Tensor) -> torch.Tensor:
        return torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(1).sub(8).to(torch.int8)
