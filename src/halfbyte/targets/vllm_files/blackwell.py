"""Blackwell: NVFP4 weights, with NVFP4 activations or 16-bit ones.

Read in vLLM 0.33 and 0.26 (``compressed_tensors.py``, ``kernels/linear``): a config group with NVFP4 weights takes
NVFP4 inputs or none; anything else is an error. With NVFP4 inputs FlashInfer's or vLLM's own CUTLASS kernels run; those
that round no inputs come after them in the list, for builds that have neither. Without inputs it is A16: FlashInfer's
CuTe kernel (0.33, sm100 and sm103, bf16 only) or Marlin.

Why the other format is A16 and not A8: A16 has the same codes, so one set of weights serves every plan. The only A8
with 4-bit weights there is MXFP4 weights with MXFP8 inputs: a second set of codes, on a coarser grid, and not what
would run. 0.26 has no such scheme and rounds inputs to MXFP4; in 0.33 none of the kernels made for Blackwell takes fp8
inputs (FlashInfer, Marlin and b12x refuse them): Humming runs if it is installed, and otherwise inputs become MXFP4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4, NVFP4A16

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import Layer, layers_of, units_of
from halfbyte.options import SearchOptions
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.arithmetics import NOT_ROUNDED
from halfbyte.quant.arithmetics.nvfp4 import GROUP, Nvfp4Scales, scale_exponent
from halfbyte.quant.grids import E2M1
from halfbyte.targets.vllm_files.compressed import Compressed
from halfbyte.targets.vllm_files.tensors import Stored

if TYPE_CHECKING:
    from halfbyte.models.loading import SourceModel
    from halfbyte.plan import Codes, LayerPlan, Plan
    from halfbyte.quant.int4 import PackedWeight
    from halfbyte.targets.vllm_files.tensors import Pack

DEFAULT_GROUP = 128  # what --group_size says where nobody set it


class Blackwell(Compressed):
    """A4 as NVFP4, and A16.

    Measured on SmolLM2-135M (2,048 tokens of calibration, 508 scored), KL in nats per token of all A16 and all A4:
    plain rounding 0.267, 0.491; GPTQ (with scales solved for at once) 0.084, 0.291; with R2 0.087, 0.283; with channel
    scales 0.106, 0.253; with both 0.105, 0.244 (rounded, not GPTQ: 0.189, 0.353); with both and R1 0.110, 0.693: it
    mixes what groups of 16 keep apart.
    """

    capabilities = (100, 103, 110, 120, 121)
    engine = "0.26"
    emulated_below = 100  # older GPUs get Marlin, which rounds no inputs
    in_transformers = "nvfp4_transformers"
    format = CompressionFormat.nvfp4_pack_quantized
    recipe: ClassVar = Recipe(
        clip=False, scale_rule=Nvfp4Scales(), arithmetic="nvfp4", a_bits=(4, 16), ends_as_stored=True
    )

    def rotations(self, *, tied: bool) -> tuple[str, ...]:
        return ("r2",)  # R1 spreads what groups of 16 keep apart

    @property
    def how_to_run(self) -> str:
        text = super().how_to_run.replace("vllm serve FOLDER", "vllm serve FOLDER --dtype bfloat16")
        return text.replace("from_pretrained(FOLDER)", "from_pretrained(FOLDER, dtype=torch.bfloat16)")

    def recipe_for(self, options: SearchOptions) -> Recipe:
        return replace(super().recipe_for(options), group_size=GROUP)

    def check_options(self, options: SearchOptions) -> None:
        super().check_options(options)
        if options.group_size not in (GROUP, DEFAULT_GROUP):
            raise HalfbyteError(
                f"--group_size: NVFP4 has weights in groups of {GROUP}, got {options.group_size}", fix="leave it out"
            )

    def check_model(
        self, source: SourceModel, layers: Sequence[Layer], options: SearchOptions, group_sizes: Mapping[str, int]
    ) -> None:
        self.check_parallel(source)
        for unit in units_of(layers, source.family, "fused"):
            inputs, _ = self.share(unit)
            if inputs % GROUP:
                raise HalfbyteError(
                    f"{unit.name}: NVFP4 needs whole groups of {GROUP} inputs on every GPU, got {inputs} inputs",
                    fix="lower --tensor_parallel, or use --target sim for this model",
                )

    def group(self, entry: LayerPlan) -> str:
        return "NVFP4, A16" if entry.a_bits == NOT_ROUNDED else "NVFP4, A4 (NVFP4)"

    def scheme(self, entry: LayerPlan, layers: list[str]) -> QuantizationScheme:
        parts = NVFP4A16 if entry.a_bits == NOT_ROUNDED else NVFP4
        return QuantizationScheme(targets=layers, format=self.format, **parts)

    def packing(self, source: SourceModel, plan: Plan, codes: Codes) -> Pack:
        """Tensors as compressed-tensors names them; what vLLM fuses gets one global scale, which is a divisor there."""
        exponents: dict[str, int] = {}
        for unit in units_of(layers_of(source.model, source.family), source.family, "fused"):
            names = [layer.name for layer in unit.layers]
            scales = torch.cat([codes.weights[name].scales.flatten() for name in names])
            exponents |= dict.fromkeys(names, scale_exponent(scales))

        def tensors(layer: str, weight: PackedWeight) -> list[Stored]:
            exponent, entry = exponents[layer], plan.layers[layer]
            rows, columns = weight.shape
            stored = [
                Stored(f"{layer}.weight_packed", torch.uint8, (rows, columns // 2), lambda: weight.packed),
                Stored(
                    f"{layer}.weight_scale",
                    torch.float8_e4m3fn,
                    tuple(weight.scales.shape),
                    lambda: exact_e4m3(weight, exponent, layer),
                ),
                _number(f"{layer}.weight_global_scale", 2.0 ** (-exponent - 1)),  # our codes are twice theirs
            ]
            if entry.a_bits != NOT_ROUNDED:
                stored.append(_number(f"{layer}.input_global_scale", entry.a_scale))
            return stored

        return tensors

    def unpack(self, words: torch.Tensor) -> torch.Tensor:
        rows, size = words.shape
        return unpack_fp4_from_uint8(words, rows, 2 * size, torch.float32).mul_(2).to(torch.int8)


def exact_e4m3(weight: PackedWeight, exponent: int, where: str) -> torch.Tensor:
    """The scales over 2 to the ``exponent``, as e4m3 numbers.

    Raises:
        HalfbyteError: codes are on another grid, or a scale is no such number, or is negative.
    """
    scales = weight.scales.float() * 2.0**-exponent
    stored = scales.to(torch.float8_e4m3fn)
    if weight.grid is not E2M1 or not torch.equal(stored.float(), scales) or bool((scales < 0).any()):
        raise HalfbyteError(
            f"{where}: codes are not NVFP4, expected e2m1 codes, and e4m3 scales, none negative",
            fix="search again with --target vllm --hardware blackwell",
        )
    return stored


def _number(name: str, value: float) -> Stored:
    return Stored(name, torch.float32, (1,), lambda: torch.tensor([value]))
