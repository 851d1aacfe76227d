"""Which kernel multiplies a packed int4 layer, and with how many activation bits: the rules of the engines.

vLLM's rules are those of version 0.32.0 with humming-kernels 0.1.17, which it asks for, read in
``model_executor/kernels/linear/__init__.py`` (order of kernels), ``kernels/linear/mixed_precision/*.py`` (what each can
do), ``layers/quantization/compressed_tensors/`` (schemes) and ``layers/quantization/utils/humming/schema.py``
(``check_and_fallback_input_schema``). ``benchmarks/serve_kernels.py`` asks vLLM's own code the same questions for every
compute capability, and a test compares the answers.

The short of it: on a GPU the scheme of a layer (W4A16, W4A8, W4A4) does not choose the kernel. The first kernel in a
fixed order that can hold int4 weights does, and only one of them, Humming, looks at the activation bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from halfbyte.targets.served.hardware import Hardware

VLLM_READ = "0.32.0"
HUMMING_READ = "0.1.17"
MARLIN_GROUPS = (32, 64, 128)
MACHETE_GROUPS = (64, 128)


@dataclass(frozen=True)
class Stored:
    """What a folder says about one matrix, as the engine sees it.

    Attributes:
        a_bits: activation bits; 16 where they are not rounded.
        group_size: weights per scale.
        in_features, out_features: of the module as it is multiplied: q, k and v in one, gate and up in one.
        dtype: what the model computes in: ``bfloat16``, ``float16`` or ``float32``.
    """

    a_bits: int
    group_size: int
    in_features: int
    out_features: int
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Computed:
    """What becomes of it.

    Attributes:
        a_bits: activation bits of the product; 16 is not rounded, 0 does not run.
        kernel: who multiplies.
        why: one clause.
    """

    a_bits: int
    kernel: str
    why: str


Rule = Callable[[Stored, Hardware], Computed]


def in_vllm(layer: Stored, hardware: Hardware) -> Computed:
    """vLLM as it starts without further flags."""
    if hardware.is_cpu:
        return _vllm_cpu(layer, hardware)
    if hardware.key == "rocm":
        return Computed(16, "Triton or another W4A16 kernel", "every kernel for AMD multiplies 16-bit activations")
    if hardware.key == "mps":
        return Computed(0, "none", "vLLM has no kernels for this device")
    if hardware.capability < 75:
        return Computed(0, "none", "needs compute capability 7.5")
    if hardware.capability == 90:
        if layer.group_size in MACHETE_GROUPS and layer.in_features % 64 == 0 and layer.out_features % 128 == 0:
            return Computed(16, "Machete", "it comes first on Hopper and multiplies 16-bit activations")
        made = in_humming(layer, hardware)
        return Computed(made.a_bits, made.kernel, f"Machete needs outputs in multiples of 128; {made.why}")
    if layer.group_size in MARLIN_GROUPS:
        return Computed(16, "Marlin", "it comes before Humming and multiplies 16-bit activations")
    return Computed(16, "a W4A16 kernel", "every kernel before Humming multiplies 16-bit activations")


def in_humming(layer: Stored, hardware: Hardware) -> Computed:
    """vLLM with ``--linear-backend humming``: activation bits count, within its own rules."""
    capability, asked = hardware.capability, layer.a_bits
    if capability < 75:
        return Computed(0, "none", "Humming needs an Nvidia GPU of compute capability 7.5")
    if asked == 16:
        return Computed(16, "Humming", "the folder does not round them")
    if asked == 8:
        return Computed(16, "Humming", "it prefers 16-bit activations where weights have scales per group")
    if 100 <= capability < 120:
        return Computed(16, "Humming", "it has no fast path under 16 bits on this generation")
    if capability < 90 and layer.group_size >= 64:
        return Computed(4, "Humming", "int4 tensor cores")
    if layer.group_size < 32:
        return Computed(16, "Humming", "groups under 32 need 16-bit activations")
    slow = "int4 tensor cores are slow here, int8 takes their place"
    return Computed(8, "Humming", slow if capability >= 90 else "int4 needs groups of 64, int8 takes its place")


def forced_int8(layer: Stored, hardware: Hardware) -> Computed:
    """vLLM on the W4A16 twin with ``VLLM_MARLIN_INPUT_DTYPE=int8`` and ``--linear-backend marlin``."""
    if hardware.capability < 75 or layer.group_size not in MARLIN_GROUPS:
        return Computed(0, "none", "Marlin needs compute capability 7.5 and groups of 32, 64 or 128")
    return Computed(8, "Marlin", "the variable counts for the whole model, whatever its groups say")


def forced_humming(layer: Stored, hardware: Hardware) -> Computed:
    """vLLM on the W4A16 twin with ``--quantization humming`` and ``VLLM_HUMMING_INPUT_QUANT_CONFIG``."""
    capability, asked = hardware.capability, layer.a_bits
    if capability < 75:
        return Computed(0, "none", "Humming needs an Nvidia GPU of compute capability 7.5")
    if asked == 4 and (capability >= 90 or layer.group_size < 64):
        return Computed(0, "none", "Humming's int4 kernels need groups of 64 and a GPU older than Hopper")
    return Computed(asked, "Humming", "an explicit type is not replaced")


def _vllm_cpu(layer: Stored, hardware: Hardware) -> Computed:
    if layer.in_features % 32 or layer.out_features % 32:
        return Computed(0, "none", "the kernel needs inputs and outputs in multiples of 32")
    if hardware.key == "cpu-avx2":
        return Computed(0, "none", "the build for AVX2 lacks the int4 product: the folder loads, the first token fails")
    if layer.dtype == "float32":
        return Computed(0, "none", "the int4 product is for bf16 and fp16: the folder loads, the first token fails")
    if hardware.key == "cpu-amx" and layer.dtype == "bfloat16":
        return Computed(8, "CPUWNA16", "with AMX and bf16 every packed int4 layer runs int8 activations")
    return Computed(16, "CPUWNA16", "without AMX and bf16 activations are not rounded")


def cpu_w4a16(layer: Stored, hardware: Hardware) -> Computed:
    """vLLM on a CPU with ``VLLM_CPU_INT4_W4A8=0``."""
    made = _vllm_cpu(layer, hardware)
    if not made.a_bits:
        return made
    return Computed(16, made.kernel, "the variable leaves all activations alone")


def in_transformers(layer: Stored, hardware: Hardware) -> Computed:
    """transformers with compressed-tensors, on any device."""
    what = "not rounded" if layer.a_bits == 16 else "rounded per token as the folder says"
    return Computed(
        layer.a_bits, "floating point", f"weights are decoded, activations {what}: right numbers, no speed-up"
    )
