"""What llama.cpp takes for a weight of each ggml type when it generates on a CPU.

Measured by ``benchmarks/type_speed.py --rounds 2`` on an AMD EPYC with AVX2, 2 threads, xllamacpp 2026.10.11549. Only
ratios are used. They hold where arithmetic decides, as with few cores; where memory does, on GPUs and with many cores,
time goes with the bytes, and then a file of equal size is as fast.
"""

from __future__ import annotations

PICOSECONDS_PER_WEIGHT = {
    "IQ4_NL": 54.2, "Q4_0": 58.8, "Q2_K": 59.0, "Q3_K": 65.4, "Q4_1": 66.3, "Q4_K": 66.5, "Q5_K": 70.4,
    "IQ2_XXS": 73.0, "IQ4_XS": 74.0, "Q5_0": 77.6, "Q6_K": 80.9, "Q5_1": 86.9, "Q8_0": 93.8, "IQ2_XS": 96.5,
    "F16": 105.0, "IQ3_S": 107.0, "IQ3_XXS": 113.0, "IQ2_S": 122.0,
}  # fmt: skip


def seconds_per_weight(type_name: str) -> float:
    """Time for one weight and one generated token; types that are not in the table count as F16."""
    return 1e-12 * PICOSECONDS_PER_WEIGHT.get(type_name, PICOSECONDS_PER_WEIGHT["F16"])
