"""Scales that fp16 and bf16 both hold, and that are never negative, from every quantiser."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant.int4 import ANY_FP16, ScaleRule, absmax_scales, searched_scales
from halfbyte.quant.quantisers import QUANTISERS, InputMoments
from halfbyte.quant.quantisers.gptq import Ordered, improve_scales
from halfbyte.quant.quantisers.rtn import round_to_nearest

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
