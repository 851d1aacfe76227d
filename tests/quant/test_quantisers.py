"""The weight quantisers beside each other, and the moments of inputs that they are given."""

from __future__ import annotations

import pytest
import torch

from halfbyte.core.distributed import Group
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


class Pair(Group):
    """One of two processes, of which the other has seen what is known here."""

    size = 2

    def __init__(self, other: InputMoments) -> None:
        self.other, self.sums = other, [other.hessian, other.away]

    def merge(self, results):
        return [*results, self.other.tokens]

    def sum_(self, tensor):
        share = self.other.tokens / sum(self.merge([5]))  # the means of the other, as it would send them
        return tensor.add_(self.sums.pop(0) * share)


@pytest.mark.parametrize("outputs", [4, 20])  # fewer and more than inputs
def test_moments_of_two_processes_are_those_of_one(outputs):
    weight, parts = torch.randn(outputs, 8), [(torch.randn(n, 8), torch.randn(n, 8)) for n in (5, 7)]
    whole, mine, theirs = (InputMoments(weight) for _ in range(3))
    for one, (x, rounded) in zip((mine, theirs), parts, strict=True):
        one.add(x, rounded)
        whole.add(x, rounded)
    mine.merge_(Pair(theirs))
    assert mine.tokens == whole.tokens == 12
    assert torch.allclose(mine.hessian, whole.hessian, atol=1e-5)
    assert torch.allclose(mine.drift, whole.drift, atol=1e-5)
    mine.keep_(slice(1, 3))
    assert torch.equal(mine.weight, weight[1:3])
    assert torch.allclose(mine.drift, whole.drift[1:3], atol=1e-5)
