"""The weight quantisers beside each other, and the moments of inputs that they are given."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant.int4 import encode_with_scales, searched_scales
from halfbyte.quant.quantisers import QUANTISERS, InputMoments
from halfbyte.quant.quantisers.gptq import output_error


def encoded(name, weight, x):
    moments = InputMoments(weight)
    moments.add(x, x)
    codes, note = QUANTISERS[name].encode(moments, 32, "here")
    assert note == ""
    return codes


def test_awq_lies_between_rounding_and_gptq():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) * torch.rand(96, generator=generator).square()
    x += torch.randn(400, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    weight, hessian = torch.randn(24, 96, generator=generator), x.T @ x / len(x)
    codes = {name: encoded(name, weight, x) for name in QUANTISERS}
    errors = {name: output_error(weight, found, hessian) for name, found in codes.items()}
    assert errors["gptq"] < errors["awq"] < 0.95 * errors["rtn"]
    scales = searched_scales(weight, 32, hessian.diagonal())
    assert torch.equal(codes["awq"].codes, encode_with_scales(weight, scales).codes)


def test_who_needs_calibration_text():
    assert {name for name, quantiser in QUANTISERS.items() if quantiser.looks_at_inputs} == {"gptq", "awq"}
    assert {name for name, quantiser in QUANTISERS.items() if quantiser.scales_for_weights} == {"awq"}


@pytest.mark.parametrize("sizes", [[60], [10, 50], [20, 20, 20]])
@pytest.mark.parametrize("rows", [8, 40])
def test_means_over_all_batches(sizes, rows):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(60, 16, generator=generator), torch.randn(rows, 16, generator=generator)
    rounded = x + 0.1 * torch.randn(60, 16, generator=generator)
    moments = InputMoments(weight)
    for one, other in zip(x.split(sizes), rounded.split(sizes), strict=True):
        moments.add(one, other)
    assert moments.tokens == 60
    assert torch.allclose(moments.hessian, rounded.T @ rounded / 60, atol=1e-5)
    assert torch.allclose(moments.drift, weight @ (x - rounded).T @ rounded / 60, atol=1e-5)
