"""How exactly CUDA multiplies fp32 matrices: in fp32, or in TF32, which is several times as fast.

TF32 rounds both factors to 10 bits of mantissa (3 more than bf16 has) and adds up in fp32. For sums over thousands of
tokens, and for blocks that run to see their inputs, that is enough (docs/results.md). For logits, for systems of
equations, and for transforms that are folded into weights it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TF32 = True  # whether it is used at all


@contextmanager
def products(*, exact: bool) -> Iterator[None]:
    """Inside, products of fp32 matrices on CUDA are computed in fp32 (``exact``) or in TF32; also as a decorator."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = TF32 and not exact
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
