"""Inputs are rounded as llama.cpp rounds them on a CPU."""

from __future__ import annotations

import torch

from halfbyte.quant.ggml.inputs import InputRounding, input_block, rounded_inputs, rounding_power
from halfbyte.quant.ggml.types import decode, encode


def inputs(columns=512):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, columns, generator=generator) * torch.rand(columns, generator=generator) ** 3
    x[2, :64] = 0
    return x


def test_the_type_says_how():
    assert {input_block(kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0")} == {32}
    assert {input_block(kind) for kind in ("Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS")} == {256}
    assert {input_block(kind) for kind in ("F16", "BF16", "F32")} == {0}


def test_blocks_of_32_are_those_of_q8_0():
    x = inputs()
    expected = torch.from_numpy(decode(encode(x, "Q8_0"), "Q8_0"))
    assert torch.allclose(rounded_inputs(x, 32), expected, atol=1e-6)


def test_blocks_of_256_share_a_scale():
    x = inputs()
    found = rounded_inputs(x, 256)
    step = x.view(6, 2, 256).abs().amax(-1, keepdim=True) / 127
    codes = found.view(6, 2, 256) / torch.where(step == 0, 1.0, step)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert ((found - x).view(6, 2, 256).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(rounded_inputs(x, 0), x)
    assert rounded_inputs(x.bfloat16(), 256).dtype == torch.bfloat16


def test_what_rounding_changes():
    x = inputs()
    expected = (x - rounded_inputs(x, 32)).square().mean(0)
    assert torch.allclose(rounding_power(x.split(2), 32, x.device), expected)


def test_a_layer_gets_rounded_inputs_until_it_is_over():
    layer, x = torch.nn.Linear(512, 3), inputs()
    plain = layer(x)
    rounding = InputRounding(layer, "Q4_K")
    assert torch.equal(layer(x), torch.nn.functional.linear(rounded_inputs(x, 256), layer.weight, layer.bias))
    rounding.block = 0
    assert torch.equal(layer(x), plain)
    rounding.handle.remove()
    assert not layer._forward_pre_hooks
