"""The loops over columns: the Triton twins against torch. On CUDA: ``tests/test_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant import kernels
from tests.quant.kernels.interpreter import interpret

UNEVEN = torch.tensor([-8.0, -5, -3, -1.5, -0.5, 0.25, 1, 2, 4, 7])


def block(rows=37, width=32):
    """target, weight, step (of either sign), mix, hessian of one block."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    target = weight + 0.1 * torch.randn(rows, width, generator=generator)
    step = (0.1 + 0.3 * torch.rand(rows, width, generator=generator)) * torch.randn(rows, 1, generator=generator).sign()
    mix = 0.2 * torch.randn(width, width, generator=generator).triu(1)
    x = torch.randn(3 * width, width, generator=generator)
    return target, weight, step, mix, x.T @ x / len(x)


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_feeds_errors_to_later_columns(bits):
    target, weight, step, mix, _ = block()
    codes, errors = kernels.round_columns(target, weight, step, mix, bits)
    assert torch.allclose(errors, weight - codes * step, atol=1e-6)
    wanted = (target + errors @ mix) / step  # mix is strictly upper: column k sees the columns before it
    half = 2 ** (bits - 1)
    assert float((wanted.clamp(-half, half - 1) - codes).abs().max()) <= 0.5 + 1e-4
    assert codes.min() == -half
    assert codes.max() == half - 1


def test_a_code_can_be_one_of_uneven_values():
    target, weight, step, mix, hessian = block()
    codes, errors = kernels.round_columns(target, weight, step, mix, UNEVEN)
    assert torch.allclose(errors, weight - codes * step, atol=1e-6)
    wanted = (target + errors @ mix) / step
    distance = (wanted.unsqueeze(-1) - UNEVEN).abs()
    assert bool(((wanted - codes).abs() <= distance.amin(-1) + 1e-4).all())
    assert set(codes.unique().tolist()) == set(UNEVEN.tolist())
    better = weight - step * kernels.descend_columns(errors @ hessian, codes, step, hessian, UNEVEN)
    costs = [((e @ hessian) * e).sum(-1) for e in (errors, better)]
    assert bool((costs[1] <= costs[0] + 1e-5).all())


def test_rows_may_have_bits_of_their_own():
    target, weight, step, mix, _ = block()
    together = kernels.round_columns(target, weight, step, mix, torch.tensor([3, 4] * 18 + [3]))
    for bits in (3, 4):
        alone = kernels.round_columns(target, weight, step, mix, bits)
        assert all(torch.equal(a[bits - 3 :: 2], b[bits - 3 :: 2]) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("width", [1, 32, 80])
def test_the_loops_are_those_of_the_definition(width):
    """One column after the other, each with all that came before; also across what torch does in one product."""
    target, weight, step, mix, hessian = block(width=width)
    codes, errors = kernels.round_columns(target, weight, step, mix, 4)
    moved = kernels.descend_columns(errors @ hessian, codes, step, hessian, 4)
    error, pull, best = torch.zeros_like(target), errors @ hessian, codes.clone()
    expected = torch.zeros_like(codes)
    for k in range(width):
        expected[:, k] = ((target[:, k] + error @ mix[:, k]) / step[:, k]).round().clamp(-8, 7)
        error[:, k] = weight[:, k] - expected[:, k] * step[:, k]
        best[:, k] = (codes[:, k] + pull[:, k] / hessian[k, k] / step[:, k]).round().clamp(-8, 7)
        pull -= ((best[:, k] - codes[:, k]) * step[:, k]).unsqueeze(1) * hessian[k]
    assert float((codes == expected).float().mean()) > 0.99  # a tie may fall either way, and all after it
    assert float((moved == best).float().mean()) > 0.99
    assert float((moved != codes).float().mean()) > 0.02 or width == 1


def test_descent_only_lowers_the_error():
    _, weight, step, _, hessian = block()
    before = (weight / step).round().clamp(-8, 7)
    error = weight - before * step
    after = kernels.descend_columns(error @ hessian, before, step, hessian, 4)
    better = weight - after * step
    costs = [((e @ hessian) * e).sum(-1) for e in (error, better)]
    assert bool((costs[1] <= costs[0] + 1e-5).all())
    assert float(costs[1].sum()) < 0.8 * float(costs[0].sum())


def test_twins_agree_in_tritons_interpreter():
    interpret(TWINS)


TWINS = """
import torch
from halfbyte.quant.kernels import forced
from halfbyte.quant.kernels import descend_columns, round_columns
from tests.quant.kernels.test_columns import UNEVEN, block

for bits, rows, width in ((4, 37, 32), (3, 4, 1), (UNEVEN, 37, 32), (torch.arange(37) % 3 + 2, 37, 32)):
    target, weight, step, mix, hessian = block(rows, width)
    found = {}
    for name in ("torch", "triton"):
        with forced(name):
            codes, errors = round_columns(target, weight, step, mix, bits)
            found[name] = codes, errors, descend_columns(errors @ hessian, codes, step, hessian, bits)
    for one, other in zip(found["torch"], found["triton"]):
        assert ((one - other).abs() < 1e-4).float().mean() > 0.999, (bits, rows, width)
"""
