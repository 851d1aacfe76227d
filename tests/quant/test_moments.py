"""Moments are means over all tokens, however they come in."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant.base import InputMoments


@pytest.mark.parametrize("sizes", [[60], [10, 50], [20, 20, 20]])
@pytest.mark.parametrize("rows", [8, 40])
def test_means_over_all_batches(sizes, rows):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(60, 16, generator=generator), torch.randn(rows, 16, generator=generator)
    rounded = x + 0.1 * torch.randn(60, 16, generator=generator)
    moments = InputMoments(weight)
    for one, other in zip(x.split(sizes), rounded.split(sizes), strict=True):
        moments.add(one, other)
    assert moments.tokens == 60
    assert torch.allclose(moments.hessian, rounded.T @ rounded / 60, atol=1e-5)
    assert torch.allclose(moments.drift, weight @ (x - rounded).T @ rounded / 60, atol=1e-5)
