"""W4 groups: the grid, the fp16 scale, group sizes, what is refused; packing, and packed codes straight to weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant import int4
from halfbyte.quant.int4 import GroupedWeight, check_packable, fitting_group_size, pack_int4, unpack_int4
from halfbyte.quant.quantisers.rtn import round_to_nearest
from tests.quant.kernels.interpreter import interpret
from tests.quant.test_affine import DTYPES, same_bits

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


@given(
    hnp.arrays(
        "int8", st.tuples(st.integers(1, 8), st.integers(1, 16).map(lambda n: 2 * n)), elements=st.integers(-8, 7)
    )
)
def test_packed_codes_round_trip(codes):
    packed = pack_int4(torch.from_numpy(codes))
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] * 2 == codes.shape[-1]
    assert torch.equal(unpack_int4(packed), torch.from_numpy(codes))


def test_even_element_is_the_low_nibble():
    assert int(pack_int4(torch.tensor([1, -1], dtype=torch.int8))) == 0xF1


@pytest.mark.parametrize("codes", [[1, 2, 3], [8, 0], [-9, 0]])
def test_packing_refuses_what_does_not_fit(codes):
    with pytest.raises(HalfbyteError):
        pack_int4(torch.tensor(codes, dtype=torch.int8))


SHAPES = [(1, 2, 1), (5, 6, 2), (3, 6, 6), (7, 96, 1), (16, 256, 2), (33, 576, 9)]  # out, in, groups


def packed_weight(out_features, in_features, groups):
    """Every code somewhere; scales of both signs, zero and denormal ones among them."""
    generator = torch.Generator().manual_seed(in_features)
    found = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    scales = torch.randn(out_features, groups, generator=generator).to(torch.float16)
    scales.view(-1)[1::5] = 0.0
    scales.view(-1)[2::5] *= 1e-7
    return pack_int4(found), scales


def reference(packed, scales, dtype):
    return GroupedWeight(unpack_int4(packed), scales).decode().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_those_of_the_decoder(shape, dtype):
    packed, scales = packed_weight(*shape)
    assert same_bits(int4.decode_packed(packed, scales, dtype), reference(packed, scales, dtype))


@pytest.mark.parametrize("elements", [1, 100, 576 * 8])
def test_chunks_do_not_show(elements, monkeypatch):
    monkeypatch.setattr(int4, "CHUNK_ELEMENTS", elements)
    packed, scales = packed_weight(33, 576, 9)
    assert same_bits(int4.decode_packed(packed, scales, torch.bfloat16), reference(packed, scales, torch.bfloat16))


def test_a_buffer_is_written_and_given_back():
    packed, scales = packed_weight(16, 256, 2)
    buffer = torch.full((16, 256), torch.nan, dtype=torch.bfloat16)
    got = int4.decode_packed(packed, scales, torch.bfloat16, out=buffer)
    assert got is buffer
    assert same_bits(buffer, reference(packed, scales, torch.bfloat16))


@pytest.mark.parametrize(
    "buffer", [torch.empty(16, 256), torch.empty(16, 128), torch.empty(256, 16, dtype=torch.bfloat16).T]
)
def test_a_buffer_of_another_kind_is_refused(buffer):
    with pytest.raises(AssertionError, match="another kind"):
        int4.decode_packed(*packed_weight(16, 256, 2), torch.bfloat16, out=buffer)


def test_twins_agree_in_tritons_interpreter():
    interpret(TWINS)


TWINS = """
import torch
from halfbyte.quant.kernels import forced
from halfbyte.quant.int4 import decode_packed
from tests.quant.test_affine import DTYPES, near_enough
from tests.quant.test_int4 import SHAPES, packed_weight

for shape in SHAPES:
    packed, scales = packed_weight(*shape)
    for dtype in DTYPES:
        found = []
        for name in ("torch", "triton"):
            with forced(name):
                found.append(decode_packed(packed, scales, dtype, out=torch.full(shape[:2], torch.nan, dtype=dtype)))
        assert near_enough(*found), (shape, dtype)
"""
