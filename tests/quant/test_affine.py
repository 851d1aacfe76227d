"""Activation quantisation: error bounds, bits, special rows, and the engine's symmetric rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.quant.affine import fake_quantise, quantise_asymmetric, quantise_symmetric

ROWS = hnp.arrays(
    "float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1e4, 1e4, width=32)
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([4, 8]))
def test_asymmetric_error_is_at_most_one_step(values, bits):
    x = torch.from_numpy(values)
    codes, scale, zero = quantise_asymmetric(x, bits)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert torch.equal(codes, codes.round())
    error = ((codes - zero) * scale - x).abs()
    assert bool((error <= scale * 1.001).all())  # half a step, and half a step more where the zero point was rounded


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([4, 8]))
def test_symmetric_error_is_half_a_step_except_at_the_top(values, bits):
    x = torch.from_numpy(values)
    codes, scale = quantise_symmetric(x, bits)
    half = 2 ** (bits - 1)
    assert codes.min() >= -half
    assert codes.max() <= half - 1
    error = (codes * scale - x).abs()
    below_top = x < (half - 1) * scale
    assert bool((error[below_top] <= 0.501 * scale.expand_as(x)[below_top]).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_less_error(symmetric):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = [float((fake_quantise(x, bits, symmetric=symmetric) - x).square().mean()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1]


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_rows_stay_zero(symmetric):
    assert torch.equal(fake_quantise(torch.zeros(3, 8), 4, symmetric=symmetric), torch.zeros(3, 8))


@pytest.mark.parametrize("value", [3.5, -0.02, 1e-20])
def test_constant_rows_are_kept(value):
    x = torch.full((2, 8), value)
    torch.testing.assert_close(fake_quantise(x, 4), x, rtol=1e-6, atol=0)


def test_symmetric_scale_is_the_rule_of_compressed_tensors():
    x = torch.tensor([[7.5, -3.0, 0.2]])
    _, scale = quantise_symmetric(x, 4)
    assert float(scale) == 1.0  # absmax / 7.5
    assert fake_quantise(x, 4, symmetric=True)[0, 0] == 7.0  # clamped to the top code


def test_rows_are_independent_and_dtype_is_kept():
    x = torch.randn(4, 32).to(torch.bfloat16)
    alone = torch.cat([fake_quantise(row.unsqueeze(0), 4) for row in x])
    assert torch.equal(fake_quantise(x, 4), alone)
    assert alone.dtype == torch.bfloat16
