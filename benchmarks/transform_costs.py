"""What transforms at run time cost, counted from shapes: multiply-accumulates per token, and bytes beside the codes.

    python benchmarks/transform_costs.py

Per unit: a rotation of n channels costs n times the sum of its factors, the low-rank product 2 · in · rank + rank².
"""

from __future__ import annotations

from halfbyte.quant.hadamard import factors
from halfbyte.report.tables import format_bytes, markdown_table
from halfbyte.transforms.learned import rank_for

# blocks, hidden, intermediate, query and key/value heads, head_dim
SHAPES = {"Qwen2.5-7B": (28, 3584, 18944, 28, 4, 128), "SmolLM2-135M": (30, 576, 1536, 9, 3, 64)}


def row(name: str) -> list[str]:
    """One model."""
    blocks, hidden, intermediate, heads, kv_heads, head_dim = SHAPES[name]
    width = heads * head_dim
    units = [  # inputs, outputs
        (hidden, (heads + 2 * kv_heads) * head_dim),
        (width, hidden),
        (hidden, 2 * intermediate),
        (intermediate, hidden),
    ]
    layers = sum(inputs * outputs for inputs, outputs in units)
    rotation = sum(inputs * sum(len(factor) for factor in factors(inputs)) for inputs, _ in units)
    ranks = [(inputs, rank_for(inputs)) for inputs, _ in units]
    learned = sum(2 * inputs * rank + rank**2 for inputs, rank in ranks)
    stored = blocks * 4 * sum(inputs * rank + rank**2 for inputs, rank in ranks)
    codes = blocks * layers * (4 + 16 / 128) / 8
    return [
        name,
        f"{100 * rotation / layers:.1f} %",
        f"{100 * learned / layers:.1f} %",
        f"{format_bytes(round(stored))} beside {format_bytes(round(codes))}",
    ]


if __name__ == "__main__":
    headers = ["", "rotation, `online`", "`learned`", "`learned` on disk, beside the W4 codes"]
    print(markdown_table(headers, [row(name) for name in SHAPES]))
