"""Folders for vLLM. What a plan may ask for follows from the GPU, so each generation is a target of its own."""

from __future__ import annotations

from halfbyte.options import VllmExportOptions
from halfbyte.targets import Target
from halfbyte.targets.vllm_files.blackwell import Blackwell
from halfbyte.targets.vllm_files.export import VllmExportResult, export_vllm
from halfbyte.targets.vllm_files.gpu import GPUTarget
from halfbyte.targets.vllm_files.hardware import capability_of
from halfbyte.targets.vllm_files.hopper import Hopper
from halfbyte.targets.vllm_files.integer import Integer

GENERATIONS: tuple[type[GPUTarget], ...] = (Integer, Hopper, Blackwell)


class VLLM(Target):
    """vLLM on a GPU that is not known yet; :meth:`on` says what that one runs."""

    name = "vllm"
    export_options = VllmExportOptions

    def on(self, hardware: str, tensor_parallel: int = 1) -> Target:
        capability = capability_of(hardware)
        kind = next(kind for kind in GENERATIONS if capability in kind.capabilities)
        return kind(capability, tensor_parallel)

    def export(self, options: VllmExportOptions) -> VllmExportResult:
        return export_vllm(options, self.on)


TARGET = VLLM()
