"""The least that stages of a search could take: their products over the rate that this machine multiplies at.

What is counted are products of matrices, from the model's shape; rounding, rotations and moving data come on top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from halfbyte.core.precision import products
from halfbyte.models.layers import Unit

SIZE = {"cuda": 8192, "cpu": 2048}  # of the square matrices that are multiplied to see how fast that is
REPEATED = 5


class Work(NamedTuple):
    """Floating-point operations of products in each precision."""

    bf16: float = 0.0
    tf32: float = 0.0
    fp32: float = 0.0


def work_of_stages(units: list[Unit], *, vocabulary: int, calib_tokens: int, search_tokens: int) -> dict[str, Work]:
    """What is multiplied in the stages that consist of products, by their names in progress; transforms of ``sim``.

    Args:
        units: of the whole model, fused.
        vocabulary: rows of the output head, as wide as the first unit's input.
    """
    hidden, blocks = units[0].layers[0].in_features, 1 + max(unit.block for unit in units)
    forward = 2.0 * sum(unit.macs for unit in units)  # per token
    head = 2.0 * vocabulary * hidden
    moments = choice = 0.0
    for unit in units:
        inputs, outputs = unit.layers[0].in_features, sum(layer.out_features for layer in unit.layers)
        away = 2 * inputs * outputs if outputs < inputs else inputs**2  # per token, halved: W (x − x̂), and its product
        moments += 2 * calib_tokens * (inputs**2 + away)
        choice += inputs**3 / 3 + outputs * inputs**2 * 11  # factor; drift 2, feedback 1, two sweeps 4, scales 4
    learned = 2 * calib_tokens * sum(unit.layers[0].in_features ** 2 for unit in units)
    alone = search_tokens * len(units) * (forward * (blocks + 1) / (2 * blocks) + head)
    return {
        "token weights": Work(bf16=calib_tokens * (3 * forward + 2 * head)),  # there, there again, and back
        "transforms and W4 codes": Work(tf32=moments + learned + 3 * calib_tokens * forward, fp32=choice),
        "KL of each unit at A4": Work(bf16=alone),
    }


def rates(device: torch.device) -> Work:
    """Floating-point operations per second of large products."""
    size = SIZE[device.type]

    def rate(dtype: torch.dtype, *, exact: bool) -> float:
        matrix = torch.randn(size, size, device=device, dtype=dtype)
        with products(exact=exact):
            matrix @ matrix
            _wait(device)
            started = time.perf_counter()
            for _ in range(REPEATED):
                matrix @ matrix
            _wait(device)
        return REPEATED * 2.0 * size**3 / (time.perf_counter() - started)

    return Work(rate(torch.bfloat16, exact=True), rate(torch.float32, exact=False), rate(torch.float32, exact=True))


def limits(work: Mapping[str, Work], rate: Work) -> dict[str, float]:
    """Stage -> seconds."""
    return {stage: sum(part / per for part, per in zip(one, rate, strict=True)) for stage, one in work.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
