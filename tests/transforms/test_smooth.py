"""SmoothQuant: the function is preserved in every family, and the spread of activations falls."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.transforms.smooth import shared_by_query_heads, smoothing_scales
from tests.tiny_models import FAMILIES


def tokens_for(source, length=40):
    return torch.randint(source.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_function_is_preserved(tiny, family, transformed):
    source = copy.deepcopy(tiny(family))
    ids = tokens_for(source)
    before = source.model(ids).logits
    weights = {name: parameter.clone() for name, parameter in source.model.named_parameters()}
    transformed(source, ids, "smooth", 0.8)
    after = source.model(ids).logits
    assert float((after - before).norm() / before.norm()) < 1e-4
    changed = {
        name.split(".", 3)[-1] for name, p in source.model.named_parameters() if not torch.equal(p, weights[name])
    }
    assert {
        "input_layernorm.weight",
        "self_attn.v_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    } <= changed
    assert not {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} & changed


def test_outlier_channels_are_tamed(tiny, transformed):
    source = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        source.model.get_submodule("model.layers.0.input_layernorm").weight[5] *= 100
    ids = tokens_for(source, 64)

    def spread() -> float:
        seen = []
        layer = source.model.get_submodule("model.layers.0.self_attn.q_proj")
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        source.model(ids)
        handle.remove()
        largest = torch.cat(seen).abs().amax(dim=0)
        return float(largest.max() / largest.median())

    before = spread()
    transformed(source, ids, "smooth", 0.5)
    assert spread() < before / 4


def test_dead_channels_are_left_alone():
    scales = smoothing_scales(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert scales.tolist() == [1.0, 1.0, 2.0]


def test_query_heads_that_share_a_value_head_share_its_scales():
    channels = torch.tensor([1.0, 2.0, 5.0, 0.0, 7.0, 8.0, 6.0, 9.0])  # four query heads of two channels
    assert shared_by_query_heads(channels, value_rows=4, head_dim=2).tolist() == [5, 2, 5, 2, 7, 9, 7, 9]
