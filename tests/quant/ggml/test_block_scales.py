"""Scales of ggml blocks by weighted error: no worse than llama.cpp's, near the best there is, and for any weights."""

import statistics

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.ggml import block_scales
from halfbyte.quant.ggml.block_scales import UNITS, Numbers, affine_steps, choose_rows, symmetric_steps
from halfbyte.quant.ggml.grid import GRIDS
from halfbyte.quant.ggml.types import decode_tensor, encode, row_bytes
from tests.quant.kernels.interpreter import interpret

KINDS = ("normal", "heavy tails", "far from zero", "outliers")
each_type = pytest.mark.parametrize("type_name", GRIDS)


def weights(kind, rows=24, columns=768):
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(rows, columns, generator=generator)
    return {
        "normal": normal * 0.02,
        "heavy tails": 0.02 * normal / torch.rand(rows, columns, generator=generator).sqrt(),
        "far from zero": 0.02 * normal + 0.1,
        "outliers": 0.02 * normal * (1 + 20 * (torch.rand(rows, columns, generator=generator) < 0.01)),
    }[kind]


def importances(kind, columns=768):
    generator = torch.Generator().manual_seed(2)
    return {"even": torch.ones(columns), "uneven": torch.randn(columns, generator=generator).mul(1.5).exp()}[kind]


def error(rows, type_name, weight, importance):
    return float(((decode_tensor(rows, type_name) - weight).square().double() * importance).sum())


@each_type
def test_error_is_less_than_of_llama_cpps_scales(type_name):
    ratios = []
    for kind in KINDS:
        for importance in ("even", "uneven"):
            weight, cost = weights(kind), importances(importance)
            theirs = torch.from_numpy(encode(weight, type_name, importance=cost))
            ours = choose_rows(weight, type_name, cost)
            assert ours.dtype == torch.uint8
            assert ours.shape == theirs.shape
            ratios.append(error(ours, type_name, weight, cost) / error(theirs, type_name, weight, cost))
    assert max(ratios) < 1.01
    assert statistics.geometric_mean(ratios) < 0.98


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
@pytest.mark.parametrize("numbers", [Numbers(-8, 7), Numbers(-4, 3), Numbers(0, 15), Numbers(0, 63)])
def test_steps_are_near_the_best_of_very_many(numbers, kind):
    x, u = weights(kind).view(-1, 32)[:64], importances("uneven").view(-1, 32)[:1].expand(64, -1)
    x = x.abs() if numbers.low == 0 else x

    def missed(step):
        return (u * (x - step.unsqueeze(-1) * numbers.nearest(x, step)).square()).sum(-1)

    largest = x.abs().amax(-1)
    tried = [
        missed(largest * size * sign) for size in torch.linspace(0.3, 1.3, 4000) / numbers.high for sign in (-1, 1)
    ]
    best = torch.stack(tried).amin(0)
    found = missed(symmetric_steps(x, u, numbers, UNITS if numbers.low == 0 else ()))
    assert float(found.sum()) <= 1.05 * float(best.sum())


def test_affine_steps_find_an_exact_grid():
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 16, (50, 32), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 15
    step, low = torch.rand(50, generator=generator) + 0.1, -torch.rand(50, generator=generator)
    x = low[:, None] + step[:, None] * codes
    for free in (True, False):
        found, least = affine_steps(x, torch.rand(50, 32, generator=generator) + 0.1, 15, free=free)
        torch.testing.assert_close(found, step, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(least, low, rtol=1e-3, atol=1e-3)


def test_a_minimum_is_above_zero_only_where_the_type_can_hold_it():
    x = torch.rand(20, 32, generator=torch.Generator().manual_seed(5)) + 2
    u = torch.ones_like(x)
    assert (affine_steps(x, u, 15, free=True)[1] > 0).all()
    assert (affine_steps(x, u, 15, free=False)[1] <= 0).all()


@each_type
def test_groups_of_one_value_and_of_zeros(type_name):
    weight = torch.zeros(4, 256)
    weight[1], weight[2], weight[3, 7] = 0.5, -0.25, 1.0
    decoded = decode_tensor(choose_rows(weight, type_name, torch.ones(256)), type_name)
    zero = 0.01 if GRIDS[type_name].table else 1e-4  # the uneven values have no zero
    torch.testing.assert_close(decoded, weight, rtol=0.02, atol=zero)
    assert not decoded[0].any()


@each_type
def test_sizes_from_tiny_to_the_largest(type_name):
    weight = weights("normal", rows=3, columns=256) / 0.02
    weight *= torch.tensor([1e-3, 1.0, 60000 / float(weight[2].abs().max())])[:, None]
    decoded = decode_tensor(choose_rows(weight, type_name, torch.ones(256)), type_name)
    assert decoded.isfinite().all()
    assert ((decoded - weight).norm(dim=1) < 0.45 * weight.norm(dim=1)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 70000.0])
def test_what_fp16_cannot_hold_is_refused(bad):
    weight = torch.ones(2, 256)
    weight[1, 3] = bad
    with pytest.raises(HalfbyteError, match=r"model\.x: values do not fit Q4_K, expected \|w\| up to 65504"):
        choose_rows(weight, "Q4_K", torch.ones(256), where="model.x")


def test_unit_and_dead_channels_of_importance_do_not_matter():
    weight, cost = weights("normal"), importances("uneven")
    for scale in (2.0**-60, 2.0**60):
        assert torch.equal(choose_rows(weight, "Q4_K", cost * scale), choose_rows(weight, "Q4_K", cost))
    assert torch.equal(choose_rows(weight, "Q5_0", cost * 0), choose_rows(weight, "Q5_0", torch.ones_like(cost)))
    cost[:512] = 0
    decoded = decode_tensor(choose_rows(weight, "Q4_K", cost), "Q4_K")
    assert (decoded[:, :256] - weight[:, :256]).norm() < 0.1 * weight[:, :256].norm()


def test_rows_do_not_depend_on_their_company(monkeypatch):
    weight, cost = weights("heavy tails"), importances("uneven")
    whole = {name: choose_rows(weight, name, cost) for name in ("Q4_K", "Q5_0", "IQ4_XS")}
    monkeypatch.setattr(block_scales, "ON_CPU", 768 * 5)
    assert all(torch.equal(choose_rows(weight, name, cost), rows) for name, rows in whole.items())


def test_no_rows():
    assert choose_rows(torch.empty(0, 256), "Q4_K", torch.ones(256)).shape == (0, row_bytes(256, "Q4_K"))


def test_twins_agree_in_tritons_interpreter():
    interpret(TWINS)


TWINS = """
import pytest
import torch
from halfbyte.quant.ggml.block_scales import choose_rows
from halfbyte.quant.ggml.grid import GRIDS
from halfbyte.quant.ggml.types import decode_tensor
from halfbyte.quant.kernels import forced

generator = torch.Generator().manual_seed(0)
weight = 0.05 * torch.randn(12, 512, generator=generator) * torch.rand(12, 1, generator=generator)
weight[3, :64] = 0
importance = torch.rand(512, generator=generator) ** 3 + 0.01
for kind in GRIDS:
    rows, errors = [], []
    for name in ("torch", "triton"):
        with forced(name):
            rows.append(choose_rows(weight, kind, importance))
        errors.append(float(((decode_tensor(rows[-1], kind) - weight).square() @ importance).double().sum()))
    same = float((rows[0] == rows[1]).float().mean())
    assert same > 0.9 and errors[1] == pytest.approx(errors[0], rel=2e-3), (kind, same, errors)
"""
