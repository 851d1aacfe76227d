"""What the targets for vLLM have in common, one for each kind of GPU."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import Layer, Unit
from halfbyte.options import SearchOptions, VllmExportOptions
from halfbyte.prepare.recipe import Recipe
from halfbyte.targets import Target, check_groups

if TYPE_CHECKING:
    from halfbyte.models.loading import SourceModel
    from halfbyte.plan import Codes, LayerPlan, Plan
    from halfbyte.quant.int4 import PackedWeight
    from halfbyte.targets.vllm_files.tensors import Pack, Stored


class GPUTarget(Target):
    """vLLM on one kind of GPU: what it has fast, and nothing else.

    Args:
        capability: compute capability times ten.
        tensor_parallel: GPUs that share every layer.

    Attributes:
        capabilities: those that the target is for.
        engine: the first version of vLLM that runs its folders.
        emulated_below: compute capability under which vLLM would leave inputs unrounded, unless told to emulate.
        tags: of the format, for the model card.
        packed_name: the last part of the name of a tensor of codes.
    """

    name = "vllm"
    export_options = VllmExportOptions
    capabilities: ClassVar[tuple[int, ...]]
    engine: ClassVar[str]
    emulated_below: ClassVar[int] = 0
    packed_name: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]

    def __init__(self, capability: int, tensor_parallel: int = 1) -> None:
        self.capability, self.tensor_parallel = capability, tensor_parallel
        self.hardware = f"sm{capability}"

    @property
    def how_to_run(self) -> str:
        """For the model card, Markdown."""
        return f"In vLLM {self.engine} or newer:\n\n    vllm serve FOLDER"

    def recipe_for(self, options: SearchOptions) -> Recipe:
        return replace(super().recipe_for(options), tensor_parallel=self.tensor_parallel)

    def check_options(self, options: SearchOptions) -> None:
        if options.granularity != "fused":
            raise HalfbyteError(
                "--granularity: vLLM wants one choice for q, k and v and one for gate and up, expected fused, "
                f"got {options.granularity}"
            )
        if self.tensor_parallel < 1:
            raise HalfbyteError(f"--tensor_parallel: must be positive, got {self.tensor_parallel}")
        if options.weights_from is not None:
            raise HalfbyteError(
                "--weights_from: the scales of a checkpoint are not those that vLLM's kernels compute with",
                fix="use --target sim, or let halfbyte choose the codes",
            )

    def check_model(
        self, source: SourceModel, layers: Sequence[Layer], options: SearchOptions, group_sizes: Mapping[str, int]
    ) -> None:
        check_groups(layers, options.group_size, group_sizes, who="vLLM's kernels need")
        self.check_parallel(source)

    def check_parallel(self, source: SourceModel) -> None:
        """Refuse a number of GPUs that the model cannot be shared by.

        Raises:
            HalfbyteError: it does not divide the model.
        """
        counts = {
            "attention heads": source.config.num_attention_heads,
            "MLP channels": source.config.intermediate_size,
        }
        for what, count in counts.items():
            if count % self.tensor_parallel:
                raise HalfbyteError(
                    f"--tensor_parallel: does not divide the model's {what}, expected a divisor of {count}, "
                    f"got {self.tensor_parallel}"
                )

    def share(self, unit: Unit) -> tuple[int, int]:
        """Inputs and outputs of a unit, all its layers together, on one GPU."""
        inputs, outputs = unit.layers[0].in_features, sum(layer.out_features for layer in unit.layers)
        if len(unit.layers) == 1:  # o_proj and down_proj, whose inputs are shared out
            return inputs // self.tensor_parallel, outputs
        return inputs, outputs // self.tensor_parallel

    @abstractmethod
    def group(self, entry: LayerPlan) -> str:
        """What a layer is computed as, for people, such as ``int4 g128, A8``."""

    @abstractmethod
    def weights(self, layer: str, weight: PackedWeight) -> list[Stored]:
        """The tensors of one layer's codes."""

    def packing(self, source: SourceModel, plan: Plan, codes: Codes) -> Pack:
        """What makes the tensors of a layer's codes, where they depend on more than those."""
        return self.weights

    @abstractmethod
    def quantization_config(self, source: SourceModel, plan: Plan) -> dict[str, Any]:
        """What ``config.json`` says of them."""

    @abstractmethod
    def unpack(self, words: torch.Tensor) -> torch.Tensor:
        """The codes in rows of the tensor ``packed_name``, by the format's own rules: int8 ``[rows, in]``."""

    def compare(self, folder: Path, source: SourceModel, plan: Plan, codes: Codes) -> tuple[float | None, str]:
        """Run the folder in others' code, and compare with the simulation.

        Returns:
            largest difference of logits over the largest logit, and empty; or None, and why nothing was run.

        Raises:
            HalfbyteError: it answers otherwise.
        """
        return None, "nothing but vLLM reads this format"
