"""GPTQ against a textbook one, and its refinements against what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.quant.int4 import absmax_scales, encode_with_scales, searched_scales
from halfbyte.quant.quantisers import InputMoments
from halfbyte.quant.quantisers.gptq import (
    DAMPING,
    ENOUGH_TOKENS,
    QUANTISER,
    Ordered,
    corrected,
    factorised,
    improve_codes,
    improve_scales,
    output_error,
    round_with_feedback,
)

WIDTHS = [(32, 32), (96, 32), (128, 128), (160, 32), (576, 64), (44, 4)]  # in, group


def correlated(tokens, width, seed=0):
    """Inputs as layers see them: a few directions carry most of the power."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, width, generator=generator)
    return loud + 0.3 * torch.randn(tokens, width, generator=generator) * torch.rand(width, generator=generator)


def layer(rows, width, seed=0):
    return 0.1 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 100))


def moment(x):
    return x.T @ x / len(x)


def damped(hessian, damping=DAMPING[0]):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))


def ordered(hessian):
    known = Ordered(hessian)
    known.factorise(DAMPING[0])
    return known


def textbook_gptq(weight, scales, hessian):
    """Algorithm 1 of arXiv:2210.17323 with act order, in fp64, one column at a time; ``hessian`` is damped."""
    order = torch.argsort(hessian.diagonal(), descending=True)
    w = weight.double()[:, order]
    step = scales.double().repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)[:, order]
    inverse = torch.linalg.inv(hessian.double()[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros_like(w)
    for k in range(w.shape[1]):
        codes[:, k] = (w[:, k] / step[:, k]).round().clamp(-8, 7)
        error = (w[:, k] - codes[:, k] * step[:, k]) / upper[k, k]
        w[:, k:] -= error.unsqueeze(1) * upper[k, k:]
    return codes[:, torch.argsort(order)].to(torch.int8)


@pytest.mark.parametrize(("width", "group"), WIDTHS)
@pytest.mark.parametrize("choose", [absmax_scales, searched_scales])
def test_codes_are_those_of_the_textbook(width, group, choose):
    hessian = moment(correlated(2 * width, width))
    weight = layer(24, width)
    scales = choose(weight, group, *([hessian.diagonal()] if choose is searched_scales else []))
    got = round_with_feedback(weight, scales, ordered(hessian))
    differs = (got.codes != textbook_gptq(weight, scales, damped(hessian))).any(dim=1)
    assert int(differs.sum()) <= 1  # a row that fp32 rounds to the other side of a tie goes another way from there
    assert torch.equal(got.scales, scales)


@pytest.mark.parametrize(("width", "group"), WIDTHS)
def test_error_is_far_below_rounding_on_the_same_scales(width, group):
    hessian, weight = moment(correlated(4 * width, width)), layer(24, width)
    scales = absmax_scales(weight, group)
    rounded = output_error(weight, encode_with_scales(weight, scales), hessian)
    got = output_error(weight, round_with_feedback(weight, scales, ordered(hessian)), hessian)
    assert got < 0.5 * rounded


def start(seed, width, group):
    hessian, weight = moment(correlated(width + 40, width, seed)), layer(6, width, seed)
    return weight, hessian, encode_with_scales(weight, absmax_scales(weight, group))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(24, 8), (160, 32)]))
def test_improving_codes_never_adds_error(seed, shape):
    weight, hessian, rounded = start(seed, *shape)
    known, exact = ordered(hessian), damped(hessian)
    for encoded in (rounded, round_with_feedback(weight, rounded.scales, known)):
        better = improve_codes(weight, encoded, known)
        assert torch.equal(better.scales, encoded.scales)
        assert output_error(weight, better, exact) <= output_error(weight, encoded, exact) * (1 + 1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(24, 8), (160, 32)]))
def test_improving_scales_adds_no_error_but_rounding_to_fp16(seed, shape):
    weight, hessian, rounded = start(seed, *shape)
    known, exact = ordered(hessian), damped(hessian)
    better = improve_scales(weight, rounded, known)
    assert torch.equal(better.codes, rounded.codes)
    assert output_error(weight, better, exact) <= output_error(weight, rounded, exact) * 1.01


def test_refinements_help():
    weight, hessian, rounded = start(0, 160, 32)
    known, exact = ordered(hessian), damped(hessian)
    first = output_error(weight, rounded, exact)
    assert output_error(weight, improve_codes(weight, rounded, known), exact) < 0.7 * first
    assert output_error(weight, improve_scales(weight, rounded, known), exact) < 0.95 * first


def test_a_group_of_zeros_stays_zero_and_takes_no_error():
    """Its codes stand for zero whatever they are, so the others must make up for everything."""
    hessian, weight = moment(correlated(200, 64)), 100 * layer(16, 64)
    weight[:, :32] = 0
    scales = absmax_scales(weight, 32)
    known = ordered(hessian)
    got = round_with_feedback(weight, scales, known)
    assert output_error(weight, got, hessian) < 0.5 * output_error(weight, encode_with_scales(weight, scales), hessian)
    assert got.codes[:, :32].count_nonzero() == 0
    assert improve_codes(weight, got, known).codes[:, :32].count_nonzero() == 0


def quantised(weight, x, of_copy, group=32):
    moments = InputMoments(weight)
    for original, copied in zip(x.split(50), of_copy.split(50), strict=True):
        moments.add(original, copied)
    return QUANTISER.encode(moments, group, "here")


def test_drift_of_the_input_is_made_up_for():
    """What matters is ``W x`` of the unquantised model, while the layer is given another x̂."""
    x, weight = correlated(ENOUGH_TOKENS, 96), layer(24, 96)
    of_copy = x + 0.2 * correlated(ENOUGH_TOKENS, 96, seed=5) + 0.1 * x.roll(1, dims=1)
    made_up, note = quantised(weight, x, of_copy)
    assert note == ""
    plain, _ = quantised(weight, of_copy, of_copy)
    expected = x @ weight.T

    def error(encoded):
        return float((of_copy @ encoded.decode().T - expected).square().mean())

    assert error(made_up) < 0.8 * error(plain)


def test_few_tokens_correct_less():
    x, weight = correlated(2 * ENOUGH_TOKENS, 32), layer(8, 32)
    of_copy = x + 0.1 * x.roll(1, dims=1)
    sizes = []
    for tokens in (ENOUGH_TOKENS // 4, ENOUGH_TOKENS, 2 * ENOUGH_TOKENS):
        moments = InputMoments(weight)
        moments.add(x[:tokens], of_copy[:tokens])
        known = factorised(Ordered(moments.take_hessian()))
        sizes.append(float((corrected(moments, known) - weight).norm()))
    assert sizes == pytest.approx([sizes[1] / 4, sizes[1], sizes[1]], rel=0.05)


def with_hessian(hessian, group=16):
    moments = InputMoments(layer(8, len(hessian)))
    moments.hessian = hessian.clone()
    return moments.weight, *QUANTISER.encode(moments, group, "here")


def test_a_hessian_that_is_not_positive_is_damped_more_and_said():
    spectrum = torch.linspace(-0.05, 2.05, 32)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    _, encoded, note = with_hessian(turn @ torch.diag(spectrum) @ turn.T)
    assert note == "GPTQ with damping 0.1"
    assert bool(encoded.scales.isfinite().all())


@pytest.mark.parametrize("hessian", [torch.zeros(32, 32), torch.ones(32, 32) * 3 - 2.5 * torch.eye(32)])
def test_a_useless_hessian_means_rounding_and_is_said(hessian):
    """A dead input, or no second moment at all."""
    if hessian.any():
        hessian = hessian - 4 * (torch.ones(32, 32) - torch.eye(32))
    weight, encoded, note = with_hessian(hessian)
    assert note == "rounded to nearest: the Hessian is not positive definite"
    scales = searched_scales(weight, 16, hessian.diagonal())
    assert torch.equal(encoded.codes, encode_with_scales(weight, scales).codes)


def test_dead_channels_cost_nothing():
    x = correlated(200, 64)
    x[:, ::5] = 0
    weight, (encoded, note) = layer(8, 64), quantised(layer(8, 64), x, x)
    assert note == ""
    rounded = encode_with_scales(weight, absmax_scales(weight, 32))
    assert output_error(weight, encoded, moment(x)) < 0.3 * output_error(weight, rounded, moment(x))
