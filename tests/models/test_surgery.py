"""Quantised layers compute what their scheme says, and refuse what does not fit."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.models.modules import is_tied
from halfbyte.models.surgery import InputScheme, QuantLinear, SharedInput, replace_linear_, set_parameters_
from halfbyte.numerics.affine import fake_quantise
from halfbyte.numerics.hadamard import rotate
from halfbyte.weights.rtn import round_to_nearest

X, WEIGHT = torch.randn(112, 96, generator=torch.Generator().manual_seed(0)).split([12, 100])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "clip"), [(4, 0.8), (8, 1.0)])  # ranges are for four bits only
def test_the_input_is_rotated_then_rounded(symmetric, bits, clip):
    layer = QuantLinear(WEIGHT, torch.ones(100), InputScheme(True, None, 0.8, symmetric), SharedInput())
    assert torch.equal(layer(X), rotate(X) @ WEIGHT.T + 1)
    layer.a_bits = bits
    rounded = fake_quantise(rotate(X), bits, symmetric=symmetric, clip=clip)
    assert torch.allclose(layer(X), rounded @ WEIGHT.T + 1, atol=1e-4)


def test_a_shared_input_is_not_mistaken_for_another():
    shared, plain, turned = SharedInput(), InputScheme(), InputScheme(rotated=True)
    first = shared.treated(X, 4, plain)
    assert shared.treated(X, 4, plain) is first
    assert torch.equal(shared.treated(X, 8, plain), fake_quantise(X, 8))
    assert torch.equal(shared.treated(X, None, turned), rotate(X))
    assert torch.equal(shared.treated(X + 1, 4, plain), fake_quantise(X + 1, 4))


def test_what_does_not_fit_is_refused(tiny):
    model = copy.deepcopy(tiny("llama").model)
    with pytest.raises(HalfbyteError, match=r"codes do not fit the layer, expected \[64, 128\], got \[100, 96\]"):
        replace_linear_(model, "model.layers.0.self_attn.k_proj", round_to_nearest(WEIGHT, 32), SharedInput())
    for name in ("model.norm.bias", "model.norm.weight"):
        with pytest.raises(HalfbyteError, match=f"{name}: parameter does not fit the model"):
            set_parameters_(model, {name: torch.ones(3)})


@pytest.mark.parametrize("first", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_is_untied_by_a_value_of_its_own(tiny, first):
    source = copy.deepcopy(tiny("qwen2-tied"))
    embedding, head = source.model.model.embed_tokens, source.model.lm_head
    values = {"model.embed_tokens.weight": torch.zeros_like(head.weight), "lm_head.weight": head.weight + 1}
    expected = values["lm_head.weight"].clone()
    set_parameters_(source.model, dict(sorted(values.items(), key=lambda item: item[0] != first)))
    assert not is_tied(source.model, source.family)
    assert not embedding.weight.any()
    assert torch.equal(head.weight, expected)
