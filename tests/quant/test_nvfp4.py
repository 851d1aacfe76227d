"""NVFP4: activations by hand, by compressed-tensors and by vLLM's formula; scales that the format holds."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import NVFP4
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam

from halfbyte.quant.arithmetics import ARITHMETICS
from halfbyte.quant.arithmetics.nvfp4 import Nvfp4Scales, global_scale, scale_exponent
from halfbyte.quant.quant_linear import InputScheme

VLLM, TRANSFORMERS = ARITHMETICS["nvfp4"], ARITHMETICS["nvfp4_transformers"]
RULE = Nvfp4Scales()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vllm_emulation(x, factor):
    """``ref_nvfp4_quant_dequant`` of vLLM 0.33 on a CPU, line by line."""
    groups = x.reshape(len(x), -1, 16)
    scale = factor * (groups.abs().amax(-1, keepdim=True).float() * (1 / 6.0))
    scale = scale.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    product = scale * (1.0 / factor)
    scaled = (groups.float() * (1.0 / (product + (product == 0) * 1e8))).clamp(-6, 6)
    size = scaled.abs()
    codes = torch.zeros_like(size)
    for low, high, code in ((0.25, 0.75, 0.5), (1.25, 1.75, 1.5), (2.5, 3.5, 3.0)):
        codes[(size > low) & (size < high)] = code
    for low, high, code in ((0.75, 1.25, 1.0), (1.75, 2.5, 2.0), (3.5, 5.0, 4.0)):
        codes[(size >= low) & (size <= high)] = code
    codes[size > 5.0] = 6.0
    return (codes * scaled.sign() * (scale / factor)).view_as(x).to(x.dtype)


def library(x, factor):
    args = NVFP4["input_activations"]
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), torch.tensor([factor]))
    return fake_quantize(x, scale, zero, args, torch.tensor([factor]))


def test_a_group_by_hand():
    """Absmax 3 with G = 64: the scale is e4m3(64 · 0.5) = 32, which is 0.5, and codes are multiples of it."""
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([3.0, -1.3, 0.7, 0.12, 0.13, 1.25])
    x[0, 16] = 9e-5  # 64 · 9e-5 / 6 is below 2⁻¹⁰, half of the least e4m3 number: the group is 0
    expected = [3.0, -1.5, 0.75, 0.0, 0.25, 1.0]
    for rule in (VLLM, TRANSFORMERS):
        got = rule.rounded(x, 4, InputScheme(scale=64.0))
        assert got[0, :6].tolist() == expected
        assert not got[0, 6:].any()
        assert torch.equal(rule.rounded(x, 16, InputScheme(scale=64.0)), x)


def test_what_is_larger_than_the_global_scale_allows_is_cut_off():
    x = torch.full((1, 16), 100.0)
    assert VLLM.rounded(x, 4, InputScheme(scale=448.0)).tolist() == [[6.0] * 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_vllms_formula(dtype, size):
    x = (size * randn(64, 96)).to(dtype)
    x[:, ::7] *= 30
    for factor in (global_scale([x]), 1234.5 / size):
        assert torch.equal(VLLM.rounded(x, 4, InputScheme(scale=factor)), vllm_emulation(x, factor))


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_the_formula_of_compressed_tensors(size):
    x = size * randn(64, 96)
    x[:, ::7] *= 30
    x[0] = 0
    for factor in (global_scale([x]), 1234.5 / size):
        got = TRANSFORMERS.rounded(x, 4, InputScheme(scale=factor))
        assert torch.equal(got, library(x, factor))
        assert float((got != VLLM.rounded(x, 4, InputScheme(scale=factor))).float().mean()) < 1e-3


def test_rows_may_have_bits_of_their_own():
    x, scheme = randn(3, 5, 32), InputScheme(scale=128.0)
    got = VLLM.rounded(x, torch.tensor([4, 16, 4], dtype=torch.int32), scheme)
    assert torch.equal(got[1], x[1])
    assert torch.equal(got[::2], VLLM.rounded(x[::2], 4, scheme))


def test_the_global_scale_is_the_power_of_two_below_that_of_compressed_tensors():
    for size in (0.01, 1.0, 7.3, 5000.0):
        x = size * randn(50, 32)
        theirs = float(generate_gparam(x.min(), x.max()))
        assert global_scale([x[:20], x[20:]]) <= theirs < 2 * global_scale([x])
    scheme = VLLM.calibrated(InputScheme(arithmetic="nvfp4"), [torch.tensor([[6.0, -448.0]])])
    assert scheme.scale == 4.0
    assert global_scale([torch.zeros(2, 16)]) == 1.0


@pytest.mark.parametrize("size", [1e-5, 1e-2, 1.0, 100.0])
def test_fitted_scales_are_e4m3_numbers_times_a_power_of_two(size):
    scales = RULE.fitted(RULE.rounded(size * randn(40, 12).abs()))
    again = scales.float() * 2.0 ** -scale_exponent(scales)
    assert torch.equal(again, again.to(torch.float8_e4m3fn).float())
    assert torch.equal(RULE.fitted(scales), scales)
    assert torch.equal(RULE.fitted(scales[:5], known=scales), scales[:5])
    assert float((scales.float() - size * randn(40, 12).abs()).abs().max()) <= size * 4 / 16


def test_a_part_of_a_unit_is_exact_with_the_power_of_the_whole():
    """q, k and v share one, and what remains of the largest scale after GPTQ may be smaller than it was."""
    scales = RULE.fitted(RULE.rounded(torch.cat([randn(4, 6).abs(), 1e-3 * randn(4, 6, seed=1).abs()])))
    for kept in (scales, scales[4:], scales.clamp_max(0.1).clone()):
        power = 2.0 ** -scale_exponent(scales if kept is not scales[4:] else kept)
        values = RULE.fitted(kept, known=scales).float() * power
        assert torch.equal(values, values.to(torch.float8_e4m3fn).float())
