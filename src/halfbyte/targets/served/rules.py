"""Which kernel multiplies a packed int4 layer, and with how many activation bits, by kind of hardware.

vLLM's rules are those of version 0.32.0 with humming-kernels 0.1.17, which it asks for, read in
``model_executor/kernels/linear/__init__.py`` (order of kernels), ``kernels/linear/mixed_precision/*.py`` (what each can
do), ``layers/quantization/compressed_tensors/`` (schemes) and ``layers/quantization/utils/humming/schema.py``
(``check_and_fallback_input_schema``). ``benchmarks/serve_kernels.py`` asks vLLM's own code the same questions for every
compute capability, and a test compares the answers.

The short of it: on a GPU the scheme of a layer (W4A16, W4A8, W4A4) does not choose the kernel. The first kernel in a
fixed order that can hold int4 weights does, and only one of them, Humming, looks at the activation bits.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from halfbyte.core.errors import HalfbyteError

VLLM_READ = "0.32.0"
HUMMING_READ = "0.1.17"
MARLIN_GROUPS = (32, 64, 128)
MACHETE_GROUPS = (64, 128)


@dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Attributes:
        key: what ``--hardware`` takes, e.g. ``sm89`` or ``cpu-amx``.
        name: for people.
        capability: CUDA compute capability without its dot; 0 if it is no CUDA device.
    """

    key: str
    name: str
    capability: int = 0

    @property
    def is_cpu(self) -> bool:
        """Whether it is a processor."""
        return self.key.startswith("cpu")


GPUS = (
    (75, "Turing (T4, RTX 20)"),
    (80, "Ampere (A100, A800, A30)"),
    (86, "Ampere (A10, A40, RTX 30)"),
    (87, "Ampere (Orin)"),
    (89, "Ada (L4, L40, RTX 40)"),
    (90, "Hopper (H100, H200)"),
    (100, "Blackwell (B200)"),
    (103, "Blackwell (B300)"),
    (110, "Blackwell (Thor)"),
    (120, "Blackwell (RTX 50, RTX PRO)"),
    (121, "Blackwell (GB10)"),
)
HARDWARE = {
    entry.key: entry
    for entry in (
        *(Hardware(f"sm{capability}", name, capability) for capability, name in GPUS),
        Hardware("rocm", "AMD GPU"),
        Hardware("cpu-amx", "x86 CPU with AMX"),
        Hardware("cpu-avx512", "x86 CPU with AVX-512, without AMX"),
        Hardware("cpu-avx2", "x86 CPU without AVX-512"),
        Hardware("cpu-arm", "Arm CPU"),
        Hardware("mps", "Apple GPU"),
    )
}


def named(key: str) -> Hardware:
    """The hardware called ``key``.

    Raises:
        HalfbyteError: there is no such key.
    """
    if key not in HARDWARE:
        raise HalfbyteError(f"--hardware: unknown hardware, expected auto or {', '.join(HARDWARE)}, got {key}")
    return HARDWARE[key]


def this_machine(device: torch.device) -> Hardware:
    """The hardware of ``device``; a CUDA capability that is not in the list is itself."""
    if device.type == "cuda":
        if torch.version.hip:
            return HARDWARE["rocm"]
        major, minor = torch.cuda.get_device_capability(device)
        key = f"sm{major}{minor}"
        return HARDWARE.get(key) or Hardware(key, torch.cuda.get_device_name(device), 10 * major + minor)
    return HARDWARE["mps"] if device.type == "mps" else this_cpu()


def this_cpu() -> Hardware:
    """Which of the processors; asked of PyTorch in the way vLLM asks."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return HARDWARE["cpu-arm"]
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return HARDWARE["cpu-amx"]
    wide = getattr(torch.cpu, "_is_avx512_supported", lambda: False)()
    return HARDWARE["cpu-avx512" if wide else "cpu-avx2"]


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


HEADERS = (
    "hardware",
    "vLLM: A8 layer",
    "vLLM: A4 layer",
    "with `--linear-backend humming`: A8, A4",
    "what can be forced",
    "how this is known",
)
# A layer that every kernel can hold: groups of 128, sizes in multiples of 128.
USUAL = Stored(a_bits=8, group_size=128, in_features=4096, out_features=4096)
ASKED = "vLLM's selection code, run without the GPU"
# (name, hardware of which the first stands for all, how it is known)
ROWS = (
    ("Turing (sm75)", ("sm75",), ASKED),
    ("Ampere, Ada (sm80, sm86, sm87, sm89)", ("sm80", "sm86", "sm87", "sm89"), ASKED),
    ("Hopper (sm90)", ("sm90",), ASKED),
    ("Blackwell (sm100, sm103, sm110)", ("sm100", "sm103", "sm110"), ASKED),
    ("Blackwell (sm120, sm121)", ("sm120", "sm121"), ASKED),
    ("AMD GPU (ROCm)", ("rocm",), "read in vLLM's source"),
    ("x86 CPU with AMX, bf16", ("cpu-amx",), "run"),
    ("x86 CPU with AVX-512, without AMX", ("cpu-avx512",), "read in vLLM's source; its path run, in fp16"),
    ("x86 CPU without AVX-512", ("cpu-avx2",), "run"),
    ("Arm CPU", ("cpu-arm",), "read in vLLM's source"),
)


def serving_table() -> list[tuple[str, ...]]:
    """One row per kind of hardware, in the order of ``HEADERS``; cells are what a layer is computed as."""
    rows = []
    for name, keys, known in ROWS:
        hardware = HARDWARE[keys[0]]
        rows.append(
            (
                name,
                _cell(in_vllm, 8, hardware),
                _cell(in_vllm, 4, hardware),
                f"{_cell(in_humming, 8, hardware)}, {_cell(in_humming, 4, hardware)}" if hardware.capability else "—",
                _forced(hardware),
                known,
            )
        )
    cells = [f"{_cell(in_transformers, bits, HARDWARE['cpu-avx2'])}, simulated" for bits in (8, 4)]
    return [*rows, ("any, in transformers instead of vLLM", *cells, "—", "—", "run on a CPU")]


def serving_markdown() -> str:
    """The table as Markdown, with the versions that it holds for."""
    lines = [
        f"What an int4 layer of this format is computed as in vLLM {VLLM_READ}, by hardware. A16 is 16-bit "
        "activations: good numbers, but not what the plan asked for.",
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|" + " --- |" * len(HEADERS),
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in serving_table())]) + "\n"


def known_about(hardware: Hardware) -> str:
    """How the table knows about ``hardware``; empty if it is not in the table."""
    return next((known for _, keys, known in ROWS if hardware.key in keys), "")


def _cell(rule: Rule, a_bits: int, hardware: Hardware) -> str:
    made = rule(replace(USUAL, a_bits=a_bits), hardware)
    return f"A{made.a_bits}" if made.a_bits else "does not run"


def _forced(hardware: Hardware) -> str:
    if not hardware.capability:
        return "A16: `VLLM_CPU_INT4_W4A8=0`" if hardware.key == "cpu-amx" else "—"
    ways = []
    if forced_int8(USUAL, hardware).a_bits:
        ways.append("all A8 (Marlin)")
    if forced_humming(replace(USUAL, a_bits=4), hardware).a_bits:
        ways.append("A8 and A4 (Humming)")
    return "; ".join(ways) or "—"
