"""Group scales by output error, never worse than absmax and of either sign; and those that an engine's rule allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.quant.ggml.scales import q4_0_blocks
from halfbyte.quant.ggml.types import decode
from halfbyte.quant.int4 import ANY_FP16, ScaleRule, absmax_scales, encode_with_scales, searched_scales
from halfbyte.quant.quantisers import QUANTISERS, InputMoments
from halfbyte.quant.quantisers.gptq import Ordered, improve_scales
from halfbyte.quant.quantisers.rtn import round_to_nearest

WEIGHTS = hnp.arrays("float32", st.just((3, 64)), elements=st.floats(-8, 8, width=32))
COSTS = hnp.arrays("float32", st.just(64), elements=st.floats(0, 100, width=32))


def cost_of(weight, encoded, importance):
    return (importance * (encoded.decode() - weight).square()).view(len(weight), -1, 32).sum(-1)  # [out, groups]


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, COSTS)
def test_no_group_is_worse_than_with_absmax(values, costs):
    weight, importance = torch.from_numpy(values), torch.from_numpy(costs)
    searched = encode_with_scales(weight, searched_scales(weight, 32, importance))
    rounded = encode_with_scales(weight, absmax_scales(weight, 32))
    assert bool((cost_of(weight, searched, importance) <= cost_of(weight, rounded, importance) * 1.0001 + 1e-9).all())


def test_most_groups_are_better():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)).square()
    searched = cost_of(weight, encode_with_scales(weight, searched_scales(weight, 32, importance)), importance)
    rounded = cost_of(weight, encode_with_scales(weight, absmax_scales(weight, 32)), importance)
    assert float(searched.sum()) < 0.85 * float(rounded.sum())


def test_important_channels_are_kept():
    """One loud channel that never matters must not widen the grid of the others."""
    weight = torch.full((1, 32), 0.1)
    weight[0, 3] = 0.13
    importance = torch.ones(32)
    importance[3] = 0.0
    scales = searched_scales(weight, 32, importance)
    assert float((encode_with_scales(weight, scales).decode() - weight)[0, 4].abs()) < 0.002


def test_a_lonely_large_weight_turns_the_grid_around():
    """-8 is a code and 8 is not: with the sign of the largest weight's opposite, it is met exactly."""
    weight = torch.tensor([[0.8] + [0.1] * 31, [-0.8] + [0.1] * 31])
    scales = searched_scales(weight, 32, torch.ones(32))
    assert torch.equal(scales, torch.tensor([[-0.1], [0.1]], dtype=torch.float16))
    encoded = encode_with_scales(weight, scales)
    assert encoded.codes[:, 0].tolist() == [-8, -8]
    assert encoded.codes[:, 1].tolist() == [-1, 1]
    assert torch.allclose(encoded.decode(), weight, atol=1e-3)


def test_negative_scales_are_exact_in_q4_0():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    encoded = encode_with_scales(weight, searched_scales(weight, 64, torch.ones(256)))
    assert 0 < int((encoded.scales < 0).sum()) < encoded.scales.numel()
    assert np.array_equal(decode(q4_0_blocks(encoded), "Q4_0"), encoded.decode().numpy())


BOTH = ScaleRule(bf16=True, signed=False)


def in_both(scales):
    return scales.dtype == torch.float16 and torch.equal(scales.to(torch.bfloat16).float(), scales.float())


def test_every_magnitude_is_rounded_to_a_number_of_both():
    """From below fp16's smallest to its largest, and halfway between neighbours."""
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).add_(1) * 2.0 ** torch.linspace(
        -27, 14.9, 200_000
    )
    rounded = BOTH.rounded(values)
    assert in_both(rounded)
    assert bool((rounded.float() - values).abs().le(values * 2.0**-7.9 + 2.0**-25).all())
    assert torch.equal(BOTH.rounded(rounded.float()), rounded)
    assert not in_both(ANY_FP16.rounded(values))


@pytest.mark.parametrize("name", QUANTISERS)
def test_quantisers_keep_the_rule(name):
    """With weights whose largest is negative or positive, by which the free choice takes both signs."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator)

    def encoded(rule):
        moments = InputMoments(weight)
        moments.add(inputs, inputs)
        return QUANTISERS[name].encode(moments, 32, "here", rule)[0]

    def error(codes):
        return float(((codes.decode() - weight) @ inputs.T).square().mean())

    free, kept = encoded(ANY_FP16), encoded(BOTH)
    assert in_both(kept.scales)
    assert bool((kept.scales > 0).all())
    assert bool((free.scales < 0).any()) == (name != "rtn")
    assert not in_both(free.scales)
    assert error(kept) < 1.3 * error(free)


def test_searched_scales_beat_those_of_the_largest_weight_without_a_sign():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    scales = searched_scales(weight, 32, torch.ones(128), rule=BOTH)
    assert in_both(scales)
    assert bool((scales > 0).all())
    assert bool((scales < absmax_scales(weight, 32, rule=BOTH)).any())


def test_least_squares_scales_that_break_the_rule_are_not_taken():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    codes = round_to_nearest(weight, 32, rule=BOTH)
    codes.codes[1].neg_()  # the best scales of this row are negative now
    known = Ordered(torch.eye(64))
    known.factorise(0.01)
    improved = improve_scales(weight, codes, known, BOTH)
    assert in_both(improved.scales)
    assert torch.equal(improved.scales[1], codes.scales[1])
    assert not torch.equal(improved.scales[0], codes.scales[0])
    assert bool((improve_scales(weight, codes, known).scales[1] < 0).all())
