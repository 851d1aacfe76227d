"""Folders for vLLM and transformers, in the compressed-tensors format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import Layer
from halfbyte.models.modules import linear
from halfbyte.options import SearchOptions, VllmExportOptions
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.int4 import ScaleRule
from halfbyte.targets import Target, check_groups
from halfbyte.targets.vllm_files.export import VllmExportResult, export_vllm

if TYPE_CHECKING:
    from halfbyte.models.loading import SourceModel


class VLLM(Target):
    """vLLM, and transformers with the compressed-tensors package.

    Engines that read the format want symmetric codes of a token's whole range. vLLM keeps scales in the model's dtype,
    mostly bf16; where its Marlin kernel makes them integers it divides by their maximum, as if none were negative.
    """

    name = "vllm"
    recipe: ClassVar = Recipe(
        symmetric=True,
        clip=False,
        scale_rule=ScaleRule(bf16=True, signed=False),
        block_rotations=True,
        ends_as_stored=True,
    )
    on_request = ("r4",)
    export_options = VllmExportOptions

    def check_options(self, options: SearchOptions) -> None:
        super().check_options(options)
        if options.granularity != "fused":
            raise HalfbyteError(
                "--granularity: vLLM wants one choice for q, k and v and one for gate and up, expected fused, "
                f"got {options.granularity}"
            )

    def check_model(
        self, source: SourceModel, layers: Sequence[Layer], options: SearchOptions, group_sizes: Mapping[str, int]
    ) -> None:
        check_groups(layers, options.group_size, group_sizes, who="vLLM's kernels need")
        down = next(layer.name for layer in layers if layer.name.endswith(source.family.down))
        if options.online_transforms and linear(source.model, down).bias is not None:
            raise HalfbyteError(
                f"{down}: vLLM cannot rotate the input of a layer with a bias", fix="leave out --online_transforms"
            )

    def export(self, options: VllmExportOptions) -> VllmExportResult:
        return export_vllm(options)


TARGET = VLLM()
