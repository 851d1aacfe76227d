"""Activation quantisation: error bounds, bits, special rows, the symmetric rule, and one width per row of a batch.

The Triton twin is compared with torch in Triton's interpreter; on CUDA in ``tests/test_gpu.py``.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.quant.affine import fake_quantise, fake_quantise_rows, quantise_asymmetric, quantise_symmetric
from tests.quant.kernels.interpreter import interpret

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


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(width, dtype=torch.float32, tokens=2):
    """Rows of every kind, ``[12, tokens, width]``, and their bits ``[12]``."""
    x = torch.randn(12, tokens, width, generator=torch.Generator().manual_seed(width))
    x[1], x[2] = x[1].abs(), -x[2].abs()
    x[3], x[4], x[5], x[6] = 0.0, -0.0, 3.7, -0.02
    x[7] *= 1e-38
    x[8] = (20 * x[8]).round() * 2.0**-149  # a few steps of denormals: scales are rounded hard, or to zero
    x[9, :, 0] = 1e4
    x[10] *= torch.finfo(dtype).max / 100
    x[11] = torch.arange(width) % 31 / 2 - 7.0  # from -7 to 8: four bits have scale 1, and every other value is a tie
    return x.to(dtype), torch.tensor([4, 8, 4, 8, 4, 8, 4, 8, 4, 4, 8, 4], dtype=torch.int32)


def same_bits(one, other):
    """Like ``torch.equal``, and zeros have the same sign."""
    kind = {2: torch.int16, 4: torch.int32}[one.element_size()]
    assert one.dtype == other.dtype
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def near_enough(one, other):
    """The same bits, but Triton's interpreter truncates where a device rounds to bf16."""
    if one.dtype == torch.bfloat16:
        return torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-37)
    return same_bits(one, other)


def row_by_row(x, bits, a4_clip, symmetric):
    widths = bits.tolist()
    clips = [a4_clip if width == 4 else 1.0 for width in widths]
    rows = zip(x, widths, clips, strict=True)
    return torch.stack([fake_quantise(row, width, symmetric=symmetric, clip=clip) for row, width, clip in rows])


@pytest.mark.parametrize("a4_clip", [1.0, 0.85, 0.7])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_what_each_is_alone(dtype, symmetric, a4_clip):
    for width in (1, 7, 33, 128, 1000):
        x, bits = batch(width, dtype)
        before = x.clone()
        for widths in (bits, 12 - bits):
            got = fake_quantise_rows(x, widths, a4_clip=a4_clip, symmetric=symmetric)
            assert same_bits(got, row_by_row(x, widths, a4_clip, symmetric)), width
        for width_of_all in (4, 8):
            got = fake_quantise_rows(x, width_of_all, a4_clip=a4_clip, symmetric=symmetric)
            widths = torch.full_like(bits, width_of_all)
            assert same_bits(got, fake_quantise_rows(x, widths, a4_clip=a4_clip, symmetric=symmetric)), width
        assert same_bits(x, before)


@pytest.mark.parametrize("shape", [(3, 16), (3, 5, 16), (3, 2, 5, 16), (1, 5, 16), (3, 0, 16)])
def test_rows_may_have_any_number_of_axes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor([4, 8, 4], dtype=torch.int32)[: shape[0]]
    assert same_bits(fake_quantise_rows(x, bits, a4_clip=0.9), row_by_row(x, bits, 0.9, False))


def test_rows_do_not_know_their_place():
    x, bits = batch(64, torch.bfloat16)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    one, other = fake_quantise_rows(x, bits, a4_clip=0.85), fake_quantise_rows(x[order], bits[order], a4_clip=0.85)
    assert same_bits(one[order], other)


def test_there_is_one_width_for_each_row():
    with pytest.raises(AssertionError):
        fake_quantise_rows(torch.ones(4, 2, 8), torch.tensor([4, 8], dtype=torch.int32))


def test_twins_agree_in_tritons_interpreter():
    interpret(TWINS)


TWINS = """
import torch
from halfbyte.quant.affine import fake_quantise_rows
from halfbyte.quant.kernels import forced
from tests.quant.test_affine import DTYPES, batch, near_enough

cases = [(1, torch.float32, 1.0), (5000, torch.float32, 0.7), (128, torch.float32, 1e-9)]
for width, dtype, clip in [*cases, *((33, dtype, 0.85) for dtype in DTYPES)]:
    x, bits = batch(width, dtype)
    for symmetric in (False, True):
        for widths in (bits, 12 - bits, 4, 8):
            found = []
            for name in ("torch", "triton"):
                with forced(name):
                    found.append(fake_quantise_rows(x, widths, a4_clip=clip, symmetric=symmetric))
            assert near_enough(*found), (width, dtype, clip, symmetric, widths)

with forced("triton"):
    assert fake_quantise_rows(torch.ones(3, 0, 16), 4).shape == (3, 0, 16)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 16)
        x[0, 3] = bad
        for symmetric in (False, True):
            result = fake_quantise_rows(x, 4, symmetric=symmetric)
            assert not result[0].isfinite().all()
            assert result[1].isfinite().all()
"""
