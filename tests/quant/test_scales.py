"""Group scales by output error: never worse than absmax, and of either sign."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.quant.ggml.scales import q4_0_blocks
from halfbyte.quant.ggml.types import decode
from halfbyte.quant.int4 import absmax_scales, encode_with_scales, searched_scales

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
