"""What llama.cpp takes for a weight of each ggml type when it generates on a CPU.

Measured by ``benchmarks/type_speed.py`` on an AMD EPYC with AVX2, 2 threads, xllamacpp 2026.10.11549. Only
ratios are used. They hold where arithmetic decides, as with few cores; where memory does, on GPUs and with many cores,
time goes with the bytes, and then a file of equal size is as fast.
"""

from __future__ import annotations

PICOSECONDS_PER_WEIGHT = {
    "Q2_K": 49.6,
    "Q4_0": 52.9,
    "IQ4_NL": 54.3,
    "Q4_K": 55.9,
    "Q3_K": 63.3,
    "IQ4_XS": 64.7,
    "Q5_K": 67.3,
    "Q4_1": 67.6,
    "Q6_K": 72.2,
    "Q5_0": 72.5,
    "Q5_1": 76.7,
    "Q8_0": 79.4,
    "IQ2_XXS": 81.1,
    "IQ2_S": 82.5,
    "IQ2_XS": 83.6,
    "IQ3_XXS": 103.0,
    "F16": 112.0,
    "IQ3_S": 119.0,
}


def seconds_per_weight(type_name: str) -> float:
    """Time for one weight and one generated token; types that are not in the table count as F16."""
    return 1e-12 * PICOSECONDS_PER_WEIGHT.get(type_name, PICOSECONDS_PER_WEIGHT["F16"])
