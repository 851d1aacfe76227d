"""int4 packing, and packed codes straight to weights, in torch and in the Triton twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant import int4
from halfbyte.quant.int4 import GroupedWeight, pack_int4, unpack_int4
from tests.quant.kernels.interpreter import interpret
from tests.quant.test_affine import DTYPES, same_bits


@given(
    hnp.arrays(
        "int8", st.tuples(st.integers(1, 8), st.integers(1, 16).map(lambda n: 2 * n)), elements=st.integers(-8, 7)
    )
)
def test_round_trip(codes):
    packed = pack_int4(torch.from_numpy(codes))
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] * 2 == codes.shape[-1]
    assert torch.equal(unpack_int4(packed), torch.from_numpy(codes))


def test_even_element_is_the_low_nibble():
    assert int(pack_int4(torch.tensor([1, -1], dtype=torch.int8))) == 0xF1


@pytest.mark.parametrize("codes", [[1, 2, 3], [8, 0], [-9, 0]])
def test_refuses_what_does_not_fit(codes):
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
from tests.quant.test_packing import SHAPES, packed_weight

for shape in SHAPES:
    packed, scales = packed_weight(*shape)
    for dtype in DTYPES:
        found = []
        for name in ("torch", "triton"):
            with forced(name):
                found.append(decode_packed(packed, scales, dtype, out=torch.full(shape[:2], torch.nan, dtype=dtype)))
        assert near_enough(*found), (shape, dtype)
"""
