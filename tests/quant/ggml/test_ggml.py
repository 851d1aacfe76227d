"""Blocks against ggml's definition, by hand and by the gguf package."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.ggml.scales import q4_0_blocks
from halfbyte.quant.ggml.types import WRITABLE, bits_per_weight, decode, encode, fits, row_bytes
from halfbyte.quant.int4 import GroupedWeight
from halfbyte.quant.quantisers.rtn import round_to_nearest


def grouped(out_features=6, in_features=256, group_size=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (out_features, in_features), generator=generator).to(torch.int8)
    scales = torch.rand(out_features, in_features // group_size, generator=generator).to(torch.float16)
    return GroupedWeight(codes, scales)


def test_block_layout_by_hand():
    codes = (torch.arange(32) % 16 - 8).to(torch.int8)
    codes[16:] = codes[16:].flip(0)
    block = q4_0_blocks(GroupedWeight(codes[None], torch.tensor([[0.5]], dtype=torch.float16)))[0]
    assert bytes(block[:2]) == np.float16(0.5).tobytes()
    assert [byte & 15 for byte in block[2:]] == [int(code) + 8 for code in codes[:16]]
    assert [byte >> 4 for byte in block[2:]] == [int(code) + 8 for code in codes[16:]]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_q4_0_decodes_to_exactly_the_codes(group_size):
    weight = grouped(group_size=group_size)
    blocks = q4_0_blocks(weight)
    assert blocks.shape == (6, 256 // 32 * 18)
    assert blocks.dtype == np.uint8
    assert np.array_equal(decode(blocks, "Q4_0"), weight.decode().numpy())
    assert np.array_equal(dequantize(blocks, GGMLQuantizationType.Q4_0), weight.decode().numpy())


def test_a_group_of_128_is_four_blocks_with_one_scale():
    weight = grouped(in_features=256, group_size=128)
    scales = q4_0_blocks(weight).reshape(6, 8, 18)[:, :, :2].copy().view(np.float16)[..., 0]
    assert np.array_equal(scales, weight.scales.numpy().repeat(4, axis=1))


def test_zero_groups_and_extremes_survive():
    codes = torch.tensor([[-8, 7] * 16, [0] * 32], dtype=torch.int8)
    weight = GroupedWeight(codes, torch.tensor([[65504.0], [0.0]], dtype=torch.float16))
    assert np.array_equal(decode(q4_0_blocks(weight), "Q4_0"), weight.decode().numpy())
    tiny = round_to_nearest(torch.full((1, 32), 1e-7), 32)
    assert np.array_equal(decode(q4_0_blocks(tiny), "Q4_0"), tiny.decode().numpy())


@pytest.mark.parametrize("group_size", [16, 48, 80])
def test_groups_that_are_no_multiple_of_32_are_refused(group_size):
    weight = grouped(in_features=group_size * 4, group_size=group_size)
    with pytest.raises(HalfbyteError, match=r"blk\.0.*multiple of 32"):
        q4_0_blocks(weight, where="blk.0")


def test_other_code_widths_are_refused():
    weight = grouped()
    with pytest.raises(HalfbyteError, match="bits 4"):
        q4_0_blocks(GroupedWeight(weight.codes, weight.scales, bits=8))


@pytest.mark.parametrize("type_name", WRITABLE)
def test_encode_and_decode_are_inverse_up_to_rounding(type_name):
    columns = 96 if fits(96, type_name) else 256
    values = torch.randn(4, columns, generator=torch.Generator().manual_seed(1))
    blocks = encode(values, type_name, importance=torch.ones(columns))
    assert blocks.nbytes == 4 * row_bytes(columns, type_name) == 4 * columns * bits_per_weight(type_name) / 8
    error = float((torch.from_numpy(decode(blocks, type_name)) - values).square().mean().sqrt())
    assert error <= (0.0 if type_name == "F32" else max(1e-2, 2.5 * 2.0 ** -bits_per_weight(type_name)))


def test_encoded_shapes_and_bits():
    values = torch.randn(2, 64, dtype=torch.float64)
    assert encode(values, "Q8_0").shape == (2, 2 * 34)
    assert encode(values, "F16").dtype == np.float16
    bits = [bits_per_weight(name) for name in ("Q4_0", "Q8_0", "F16", "Q4_K")]
    assert bits == [4.5, 8.5, 16.0, 4.5]


@pytest.mark.parametrize("value", [65505.0, float("nan"), float("inf"), -1e6])
def test_values_beyond_fp16_are_refused(value):
    values = torch.zeros(1, 32)
    values[0, 3] = value
    for type_name in ("F16", "Q8_0", "Q4_0"):
        with pytest.raises(HalfbyteError, match="do not fit"):
            encode(values, type_name, where="down_proj")
    if np.isfinite(value):
        assert decode(encode(values, "F32"), "F32")[0, 3] == value


def test_rows_and_types_are_checked():
    with pytest.raises(HalfbyteError, match="multiple of 32"):
        encode(torch.zeros(2, 40), "Q8_0")
    with pytest.raises(HalfbyteError, match="unknown tensor type"):
        encode(torch.zeros(2, 256), "IQ1_S")
    with pytest.raises(HalfbyteError, match=r"multiple of 256.*got 288; choose F16, BF16 or a type in blocks of 32"):
        encode(torch.zeros(2, 288), "Q4_K")
    with pytest.raises(HalfbyteError, match="unknown tensor type"):
        bits_per_weight("Q9_9")
