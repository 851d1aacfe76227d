"""Hopper: fp8 activations in CUTLASS W4A8, 16-bit activations in Machete. There is no fast A4.

vLLM takes CUTLASS for int4 weights in groups of 128 with fp8 activations per token, where inputs and outputs on each
GPU are multiples of 128 (its ``kernels/linear/mixed_precision/cutlass.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_args import QuantizationArgs, QuantizationStrategy, QuantizationType

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import Unit
from halfbyte.options import SearchOptions
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.arithmetics.cutlass import Fp8Scales
from halfbyte.targets.vllm_files.compressed import Compressed

if TYPE_CHECKING:
    from halfbyte.plan import LayerPlan

MULTIPLE = 128  # of inputs and outputs, and the group size


class Hopper(Compressed):
    """A8 as fp8, and A16."""

    capabilities = (90,)
    engine = "0.23"
    in_transformers = "fp8"
    default_budget = 1.25
    recipe: ClassVar = Recipe(
        clip=False,
        scale_bits=8,
        scale_rule=Fp8Scales(),
        arithmetic="cutlass",
        a_bits=(8, 16),
        ends_as_stored=True,
    )

    def widths(self, unit: Unit) -> tuple[int, ...]:
        runs_a8 = all(size % MULTIPLE == 0 for size in self.share(unit))
        return (8, 16) if runs_a8 else (16,)

    def check_options(self, options: SearchOptions) -> None:
        super().check_options(options)
        if options.group_size != MULTIPLE:
            raise HalfbyteError(
                f"--group_size: CUTLASS W4A8 wants weights in groups of {MULTIPLE}, got {options.group_size}"
            )

    def group(self, entry: LayerPlan) -> str:
        return f"int4 g{entry.group_size}, {'A16' if entry.a_bits == 16 else 'A8 (fp8)'}"

    def scheme(self, entry: LayerPlan, layers: list[str]) -> QuantizationScheme:
        inputs = QuantizationArgs(
            num_bits=8, type=QuantizationType.FLOAT, strategy=QuantizationStrategy.TOKEN, symmetric=True, dynamic=True
        )
        weights = QuantizationArgs(
            num_bits=4,
            type=QuantizationType.INT,
            strategy=QuantizationStrategy.GROUP,
            group_size=entry.group_size,
            symmetric=True,
        )
        return QuantizationScheme(
            targets=layers,
            weights=weights,
            input_activations=inputs if entry.a_bits == 8 else None,
            format=CompressionFormat.pack_quantized,
        )
