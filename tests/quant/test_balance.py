"""Balancing transforms: what they equalise, and that they undo themselves."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant.balance import EXACT_UP_TO, balancing_matrices, balancing_scales, low_rank_balance


def correlated(rows, n, seed, strength=3.0):
    """Rows with a few strong directions, fp32 ``[rows, n]``."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.randn(rows, 4, generator=generator) @ torch.randn(4, n, generator=generator)
    return strength * loud + torch.randn(rows, n, generator=generator) * torch.rand(n, generator=generator)


def moment(rows):
    return rows.T @ rows / len(rows)


def test_scales_equalise_powers_at_one_half():
    x, w = correlated(200, 16, 0), correlated(50, 16, 1)
    scales = balancing_scales(x.square().mean(0), w.square().mean(0), 0.5)
    assert torch.allclose((x / scales).square().mean(0), (w * scales).square().mean(0), rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_scales_at_the_ends_make_one_side_flat(alpha):
    x, w = correlated(200, 16, 0), correlated(50, 16, 1)
    scales = balancing_scales(x.square().mean(0), w.square().mean(0), alpha)
    flat = (x / scales if alpha else w * scales).square().mean(0)
    assert torch.allclose(flat, torch.ones(16), rtol=1e-4)


def test_dead_channels_are_left_alone():
    scales = balancing_scales(torch.tensor([0.0, 4.0, 16.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert scales.tolist() == [1.0, 1.0, 2.0]


def test_matrices_give_both_sides_the_same_moments():
    cx, cw = moment(correlated(200, 24, 0)), moment(correlated(60, 24, 1))
    forward, backward = balancing_matrices(torch.stack([cx, cw]), torch.stack([cw, cx]), ridge=1e-6)
    assert torch.allclose(forward @ backward, torch.eye(24).expand(2, -1, -1), atol=1e-3)
    assert torch.allclose(forward, forward.mT, atol=1e-4)
    t, inverse = forward[0].double(), backward[0].double()
    activations, weights = t @ cx.double() @ t, inverse @ cw.double() @ inverse
    assert float((activations - weights).norm() / weights.norm()) < 1e-3
    assert torch.allclose(forward[1], backward[0], rtol=1e-3, atol=1e-4)  # roles exchanged, transform inverted


def cost(forward, backward, cx, cw):
    """tr(T Cx Tᵀ) · tr(T⁻ᵀ Cw T⁻¹)."""
    return float((forward @ cx @ forward.T).trace() * (backward.T @ cw @ backward).trace())


@pytest.mark.parametrize(("n", "rank"), [(64, 8), (EXACT_UP_TO + 64, 16)])
def test_low_rank_keeps_the_product_and_lowers_the_error(n, rank):
    x, weight = correlated(400, n, 0), correlated(2 * n, n, 1, strength=0.5)
    cx, cw = moment(x), weight.T @ weight
    found = low_rank_balance(cx, cw, rank)
    assert found.basis.shape == (n, rank)
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(rank), atol=1e-5)
    expected = x @ weight.T
    got = found.forward(x) @ found.backward(weight).T
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    forward, backward = found.forward(torch.eye(n)).T, found.backward(torch.eye(n))
    eye = torch.eye(n)
    least = cost(forward, backward, cx, cw)
    assert least < 0.5 * cost(eye, eye, cx, cw)
    inside = found.basis @ found.basis.T  # its span is in balance with what is outside
    for factor in (0.7, 1.4):
        other = (eye + (factor - 1) * inside) @ forward, backward @ (eye + (1 / factor - 1) * inside)
        assert least < cost(*other, cx, cw)


def test_full_rank_is_the_exact_balance():
    cx, cw = moment(correlated(200, 16, 0)), moment(correlated(60, 16, 1))
    found = low_rank_balance(cx, cw, 16)
    forward, backward = balancing_matrices(cx, cw, ridge=1e-4)
    low_rank = found.forward(torch.eye(16)).T
    assert torch.allclose(low_rank / low_rank.norm(), forward / forward.norm(), atol=1e-3)
    assert cost(low_rank, found.backward(torch.eye(16)), cx, cw) == pytest.approx(
        cost(forward, backward, cx, cw), rel=1e-2
    )


@pytest.mark.parametrize("dead", ["activations", "weights"])
def test_a_dead_side_leaves_everything_alone(dead):
    """A norm of zeros, or a layer of zeros: nothing to balance."""
    alive, nothing = moment(correlated(100, 16, 0)), torch.zeros(16, 16)
    found = low_rank_balance(*((nothing, alive) if dead == "activations" else (alive, nothing)), 4)
    x, weight = correlated(10, 16, 2), correlated(10, 16, 3)
    assert torch.allclose(found.forward(x) @ found.backward(weight).T, x @ weight.T, rtol=1e-3, atol=1e-2)
