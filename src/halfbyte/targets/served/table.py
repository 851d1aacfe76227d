"""The rules as one small table, for the documents and for the card of an exported model."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.targets.served.hardware import HARDWARE, Hardware
from halfbyte.targets.served.rules import (
    VLLM_READ,
    Rule,
    Stored,
    forced_humming,
    forced_int8,
    in_humming,
    in_transformers,
    in_vllm,
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
_ROWS = (
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
    for name, keys, known in _ROWS:
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
    return next((known for _, keys, known in _ROWS if hardware.key in keys), "")


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
