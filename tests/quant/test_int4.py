"""W4 groups: the grid, the fp16 scale, group sizes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.int4 import GroupedWeight, check_packable, fitting_group_size
from halfbyte.quant.quantisers.rtn import round_to_nearest

WEIGHTS = hnp.arrays("float32", st.just((4, 64)), elements=st.floats(-100, 100, width=32))


@settings(max_examples=80, deadline=None)
@given(WEIGHTS)
def test_error_is_half_a_step_and_encoding_is_idempotent(values):
    weight = torch.from_numpy(values)
    coded = round_to_nearest(weight, 32)
    decoded = coded.decode()
    step = coded.scales.float().repeat_interleave(32, dim=1)
    # the scale is rounded to fp16 after it is chosen: the largest weight may lie a little beyond the top code
    assert bool(((decoded - weight).abs() <= 0.5 * step + 7 * step * 2**-10 + 7 * 2**-24).all())
    assert coded.codes.min() >= -8
    assert coded.codes.max() <= 7
    again = round_to_nearest(decoded, 32)
    assert (
        torch.equal(again.decode(), decoded)
        or float((again.decode() - decoded).abs().max()) <= float(step.max()) * 2**-8
    )


def test_scale_is_absmax_over_seven_in_fp16():
    weight = torch.tensor([[0.1, -0.7, 0.3, 0.2]])
    coded = round_to_nearest(weight, 4)
    assert coded.scales.dtype == torch.float16
    assert coded.scales.item() == torch.tensor(0.7 / 7).half().item()
    assert coded.codes.tolist() == [[1, -7, 3, 2]]


@pytest.mark.parametrize(
    ("row", "asked", "group"), [(3584, 128, 128), (576, 128, 64), (896, 128, 128), (100, 128, 4), (7, 128, 1)]
)
def test_group_size_falls_back_to_the_largest_power_of_two_that_divides(row, asked, group):
    assert fitting_group_size(row, asked) == group


def test_error_falls_with_bits():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        float((round_to_nearest(weight, 128, bits).decode() - weight).square().mean()) for bits in (2, 3, 4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_zero_group_codes_zero():
    weight = torch.zeros(2, 64)
    weight[0, 40] = 1.0
    coded = round_to_nearest(weight, 32)
    assert coded.scales.count_nonzero() == 1
    assert coded.decode().count_nonzero() == 1
    assert coded.codes[0, 40] == 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused_by_name(bad):
    weight = torch.ones(2, 64)
    weight[1, 3] = bad
    with pytest.raises(HalfbyteError, match=r"layers\.3\.mlp\.down_proj: weights are not finite.*1 of 128"):
        round_to_nearest(weight, 64, where="model.layers.3.mlp.down_proj")


def test_scales_beyond_fp16_are_refused():
    with pytest.raises(HalfbyteError, match="too large for fp16"):
        round_to_nearest(torch.full((1, 32), 1e6), 32)


@pytest.mark.parametrize("shape", [(5, 64), (3, 2)])
def test_packed_codes_are_the_same_in_half_the_memory(shape):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    known = GroupedWeight(codes, torch.randn(shape[0], 2, generator=generator).half())
    packed = known.pack()
    assert (packed.shape, packed.group_size) == (known.shape, known.group_size) == (shape, shape[1] // 2)
    assert packed.packed.dtype == torch.uint8
    assert packed.packed.numel() == codes.numel() / 2
    assert torch.equal(packed.unpack().codes, codes)
    assert torch.equal(packed.decode(), known.decode())
    assert packed.to("cpu").packed is packed.packed


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(HalfbyteError, match=r"only 4-bit codes.*got 8"):
        round_to_nearest(torch.ones(2, 64), 32, 8).pack()
    with pytest.raises(HalfbyteError, match="odd number"):
        round_to_nearest(torch.ones(2, 7), 7).pack()
    check_packable(64, where="a.b")
    with pytest.raises(HalfbyteError, match=r"a\.b: an odd number of inputs.*got 7"):
        check_packable(7, where="a.b")


def test_bits_per_weight():
    assert round_to_nearest(torch.ones(1, 128), 128).bits_per_weight == 4.125
