"""Packed codes straight to weights, against unpacking and decoding; the Triton twin against torch."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant.int4 import GroupedWeight, pack_int4, unpack_int4
from halfbyte.quant.kernels import codes
from tests.quant.kernels.interpreter import interpret
from tests.quant.kernels.test_activations import DTYPES, same_bits

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
    assert same_bits(codes.decode_packed(packed, scales, dtype), reference(packed, scales, dtype))


@pytest.mark.parametrize("elements", [1, 100, 576 * 8])
def test_chunks_do_not_show(elements, monkeypatch):
    monkeypatch.setattr(codes, "CHUNK_ELEMENTS", elements)
    packed, scales = packed_weight(33, 576, 9)
    assert same_bits(codes.decode_packed(packed, scales, torch.bfloat16), reference(packed, scales, torch.bfloat16))


def test_a_buffer_is_written_and_given_back():
    packed, scales = packed_weight(16, 256, 2)
    buffer = torch.full((16, 256), torch.nan, dtype=torch.bfloat16)
    got = codes.decode_packed(packed, scales, torch.bfloat16, out=buffer)
    assert got is buffer
    assert same_bits(buffer, reference(packed, scales, torch.bfloat16))


@pytest.mark.parametrize(
    "buffer", [torch.empty(16, 256), torch.empty(16, 128), torch.empty(256, 16, dtype=torch.bfloat16).T]
)
def test_a_buffer_of_another_kind_is_refused(buffer):
    with pytest.raises(AssertionError, match="another kind"):
        codes.decode_packed(*packed_weight(16, 256, 2), torch.bfloat16, out=buffer)


def test_twins_agree_in_tritons_interpreter():
    interpret(TWINS)


TWINS = """
import torch
from halfbyte.quant.kernels import forced
from halfbyte.quant.kernels.codes import decode_packed
from tests.quant.kernels.test_activations import DTYPES, near_enough
from tests.quant.kernels.test_codes import SHAPES, packed_weight

for shape in SHAPES:
    packed, scales = packed_weight(*shape)
    for dtype in DTYPES:
        found = []
        for name in ("torch", "triton"):
            with forced(name):
                found.append(decode_packed(packed, scales, dtype, out=torch.full(shape[:2], torch.nan, dtype=dtype)))
        assert near_enough(*found), (shape, dtype)
"""
