"""SmoothQuant: the function is preserved in every family, and the spread of activations falls."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.calibration.blocks import walk_blocks
from halfbyte.preparation import smooth_
from halfbyte.progress import silent
from halfbyte.transforms.smoothquant import smoothing_scales
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_function_is_preserved(tiny, family, alpha):
    source = copy.deepcopy(tiny(family))
    ids = torch.randint(source.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    before = source.model(ids).logits
    weights = {name: parameter.clone() for name, parameter in source.model.named_parameters()}
    smooth_(source, ids, alpha, silent)
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


def test_outlier_channels_are_tamed(tiny):
    source = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        source.model.get_submodule("model.layers.0.input_layernorm").weight[5] *= 100
    ids = torch.randint(source.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))

    def spread() -> float:
        seen = []
        for step in walk_blocks(source.model, source.family, ids, device=source.device):
            step.forward({"self_attn.q_proj": seen.append})
            break
        largest = torch.cat(seen).abs().amax(dim=0)
        return float(largest.max() / largest.median())

    before = spread()
    smooth_(source, ids, 0.5, silent)
    assert spread() < before / 4


def test_dead_channels_are_left_alone():
    scales = smoothing_scales(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert scales.tolist() == [1.0, 1.0, 2.0]
