"""What engines compute layers as: their rounding rules, by examples and by independent formulas."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant.arithmetics import ARITHMETICS
from halfbyte.quant.arithmetics.cutlass import Fp8Scales, row_scale
from halfbyte.quant.int4 import GroupedWeight, searched_scales
from halfbyte.quant.quant_linear import InputScheme, QuantLinear, SharedInput, replace_linear_
from halfbyte.quant.quantisers.rtn import round_to_nearest


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_humming_by_hand():
    scheme = InputScheme(arithmetic="humming", group=4)
    x = torch.tensor([[7.0, 3.5, -1.5, 2.5, 0.0, 0.0, 0.0, 0.0, -127.0, 1.5, 0.5, 2.4, 14.0, 3.0, 5.0, -14.0]])
    four = scheme.rounded(x, 4)  # scales 1, none, 127 / 7, 2; halves go to the even code
    step = 127 / 7
    expected = torch.tensor([[7.0, 4, -2, 2, 0, 0, 0, 0, -7 * step, 0, 0, 0, 14, 4, 4, -14]])
    assert torch.allclose(four, expected, rtol=1e-6)
    eight = scheme.rounded(x, 8)
    assert torch.allclose(eight[:, 8:12], torch.tensor([[-127.0, 2, 0, 2]]))
    assert torch.equal(scheme.rounded(x, 16), x)


def test_fp8_is_that_of_compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = noise(5, 64) * torch.logspace(-3, 3, 64)
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = calculate_qparams(low, high, arguments)
    theirs = fake_quantize(x, scale, zero, arguments)
    assert torch.equal(InputScheme(arithmetic="fp8").rounded(x, 8), theirs)


def as_cutlass_loads_it(weight: GroupedWeight) -> torch.Tensor:
    """An independent reading of vLLM's loader: bf16 scales to fp8 per row, then products looked up in fp8."""
    scales = weight.scales.to(torch.bfloat16).float()
    channel = (scales.abs().amax(1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
    fp8 = (scales * channel.reciprocal()).to(torch.float8_e4m3fn)
    fp8 = (fp8.float() / 8.0).to(torch.float8_e4m3fn)
    channel = channel * 8
    table = torch.stack([(fp8.float() * code).to(torch.float8_e4m3fn).float() for code in range(-8, 8)], dim=-1)
    codes = weight.codes.view(*scales.shape, -1).long() + 8
    return (table.gather(-1, codes) * channel.unsqueeze(-1)).view(weight.shape)


@pytest.mark.parametrize("size", [1.0, 1e-3])  # the second below the least factor that the kernel has
def test_cutlass_weights_are_what_vllm_loads(size):
    weight = round_to_nearest(noise(32, 512) * size, 128, rule=Fp8Scales())
    ours = ARITHMETICS["cutlass"].decoded(weight, 8)
    assert torch.allclose(ours, as_cutlass_loads_it(weight), rtol=1e-6, atol=0)
    assert torch.equal(ARITHMETICS["cutlass"].decoded(weight, 16), weight.decode())


def test_fitted_scales_lose_nothing_when_they_are_loaded():
    rule = Fp8Scales()
    weight = noise(64, 1024) * (0.1 + torch.rand(64, 1, generator=torch.Generator().manual_seed(1)))
    scales = searched_scales(weight, 128, torch.ones(1024), rule=rule)
    assert bool((scales < 0).any())
    assert torch.equal(rule.fitted(scales), scales)  # fitted already
    assert torch.equal(scales.to(torch.bfloat16).float(), scales.float())
    row = row_scale(scales.float())
    loaded = (scales.float() / row).to(torch.float8_e4m3fn).float() * row
    assert torch.equal(loaded, scales.float())
    plain = round_to_nearest(weight, 128).scales.float()  # scales of no rule do lose something
    row = row_scale(plain)
    assert not torch.equal((plain / row).to(torch.float8_e4m3fn).float() * row, plain)


def test_new_scales_keep_the_largest_of_known_ones():
    rule = Fp8Scales()
    known = rule.fitted(noise(16, 8).abs().half())
    new = rule.fitted((known.float() * (1 + 0.2 * noise(16, 8, seed=1))).half(), known=known)
    at = known.abs().argmax(1, keepdim=True)
    assert torch.equal(new.gather(1, at), known.gather(1, at))
    assert torch.equal(row_scale(new.float()), row_scale(known.float()))


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_a_batch_have_their_own_weights(packed):
    """A8 and A16 rows of one batch are those of two layers."""
    parent = torch.nn.Module()
    parent.layer = torch.nn.Linear(256, 32, bias=True)
    weight = round_to_nearest(noise(32, 256), 128, rule=Fp8Scales())
    scheme = InputScheme(arithmetic="cutlass")
    replace_linear_(parent, "layer", weight.pack() if packed else weight, SharedInput(), scheme, packed=packed)
    layer = parent.layer
    assert isinstance(layer, QuantLinear)
    x = noise(4, 3, 256)
    layer.a_bits = torch.tensor([8, 16, 16, 8], dtype=torch.int32)
    mixed = layer(x)
    found = {}
    for bits in (8, 16):
        layer.a_bits = bits
        found[bits] = layer(x)
    assert torch.equal(mixed, torch.stack([found[8][0], found[16][1], found[16][2], found[8][3]]))
    decoded = ARITHMETICS["cutlass"].decoded(weight, 8)
    expected = torch.nn.functional.linear(scheme.rounded(x, 8), decoded, layer.bias)
    assert torch.allclose(found[8], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[8], found[16], rtol=1e-3)
