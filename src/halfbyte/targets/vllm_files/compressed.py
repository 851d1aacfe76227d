"""The compressed-tensors format, which vLLM and transformers read: what Hopper and Blackwell targets share.

Per quantised layer of integers: ``weight_packed`` (int32 ``[out, in / 8]``, eight offset codes to a word),
``weight_scale`` (bf16 ``[out, groups]``) and ``weight_shape``; a config group per activation width and group size.
Source: the ``compressed-tensors`` package, ``compressors/pack_quantized`` and ``quantization/quant_config.py``.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from transformers import AutoModelForCausalLM

from halfbyte.calibration.text import pydoc_text
from halfbyte.core.environment import available_memory
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import report
from halfbyte.evaluate.quality import windows_for
from halfbyte.models.estimate import estimate_load
from halfbyte.prepare.simulation import become_simulation_, plan_bits
from halfbyte.quant.quant_linear import set_activation_bits_, set_parameters_
from halfbyte.targets.vllm_files.gpu import GPUTarget
from halfbyte.targets.vllm_files.tensors import Stored, exact_scales, packed_words

if TYPE_CHECKING:
    from halfbyte.models.loading import SourceModel
    from halfbyte.plan import Codes, LayerPlan, Plan
    from halfbyte.quant.int4 import PackedWeight

CHECK_TOKENS = 256
LARGEST_DIFFERENCE = 1e-4  # of logits in fp32, over the largest: both sides round to the same codes


class Compressed(GPUTarget):
    """Folders that transformers reads too, and computes in floating point.

    Attributes:
        in_transformers: what transformers computes the layers as (:mod:`halfbyte.quant.arithmetics`).
        format: of the codes.
    """

    packed_name = "weight_packed"
    tags = ("compressed-tensors",)
    in_transformers: ClassVar[str]
    format: ClassVar = CompressionFormat.pack_quantized

    @property
    def how_to_run(self) -> str:
        return (
            f"{super().how_to_run}\n\ntransformers reads it too, and computes it in floating point: "
            "`AutoModelForCausalLM.from_pretrained(FOLDER)`."
        )

    @abstractmethod
    def scheme(self, entry: LayerPlan, layers: list[str]) -> QuantizationScheme:
        """The config group of layers with this entry."""

    def weights(self, layer: str, weight: PackedWeight) -> list[Stored]:
        rows, columns = weight.shape
        scales = tuple(weight.scales.shape)
        return [
            Stored(f"{layer}.weight_packed", torch.int32, (rows, columns // 8), lambda: packed_words(weight, layer)),
            Stored(f"{layer}.weight_scale", torch.bfloat16, scales, lambda: exact_scales(weight, layer)),
            Stored(f"{layer}.weight_shape", torch.int64, (2,), lambda: torch.tensor([rows, columns])),
        ]

    def unpack(self, words: torch.Tensor) -> torch.Tensor:
        return unpack_from_int32(words, 4, torch.Size((len(words), 8 * words.shape[1])))

    def quantization_config(self, source: SourceModel, plan: Plan) -> dict[str, Any]:
        layers: dict[str, list[str]] = {}
        for name, entry in plan.layers.items():
            layers.setdefault(self.group(entry), []).append(name)
        groups: dict[str, QuantizationScheme | list[str]] = {
            f"group_{at}": self.scheme(plan.layers[names[0]], names) for at, names in enumerate(layers.values())
        }
        config = QuantizationConfig(
            config_groups=groups,
            format=self.format.value,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=[source.family.head],
        )
        return config.model_dump(mode="json", exclude_none=True)

    def compare(self, folder: Path, source: SourceModel, plan: Plan, codes: Codes) -> tuple[float | None, str]:
        """fp32 logits of transformers against a simulation of what transformers computes."""
        too_large = _too_large(source)
        if too_large:
            return None, too_large
        report("check logits", 0, 2, "transformers")
        window = torch.tensor([windows_for(source, pydoc_text(), CHECK_TOKENS, 1, where="check text")[0]])
        theirs = logits_in_transformers(folder, window)
        report("check logits", 1, 2, "simulation")
        layers = {name: replace(entry, arithmetic=self.in_transformers) for name, entry in plan.layers.items()}
        become_simulation_(source, codes, layers, packed=True)
        set_activation_bits_(source.model, plan_bits(plan))
        source.model.float()  # only now: its own weights, decoded, would not fit where the packed ones do
        set_parameters_(source.model, codes.parameters)  # with all their bits
        with torch.no_grad():
            ours = source.model(input_ids=window, use_cache=False).logits
        difference = float((theirs - ours).abs().max() / ours.abs().max())
        report("check logits", 2, 2, f"largest difference {difference:.1g}")
        if not difference <= LARGEST_DIFFERENCE:
            raise HalfbyteError(
                f"{folder.name}: transformers does not agree with the simulation, "
                f"expected {LARGEST_DIFFERENCE:g}, got {difference:.3g}",
                fix="nothing was kept; report this as a bug",
            )
        return difference, ""


def logits_in_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 logits ``[windows, length, vocabulary]`` of the folder in transformers."""
    with _quiet(), torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        model.hf_quantizer.compressor.decompress_model(model)
        torch.nn.Module.float(model)  # some formats are decoded to bf16; transformers' own method refuses
        return model.eval()(input_ids=tokens, use_cache=False).logits


@contextmanager
def _quiet() -> Iterator[None]:
    """The library draws progress bars of its own, which would break ours."""
    with redirect_stderr(io.StringIO()):
        yield


def _too_large(source: SourceModel) -> str:
    """Why the folder is not run in transformers, which decodes all of it to fp32; empty if there is memory enough."""
    cpu = torch.device("cpu")
    need = estimate_load(source.config, source.family, torch.float32, with_codes=True)
    outside = 4 * (need.parameters - need.linear_parameters)  # of our own side
    wanted, there = need.on(cpu) + outside, available_memory(cpu)
    return "" if wanted <= there else f"that takes {wanted / 1e9:.0f} GB of memory, and {there / 1e9:.0f} GB are free"
