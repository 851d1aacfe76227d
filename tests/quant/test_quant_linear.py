"""Quantised layers compute what their scheme says, and refuse what does not fit."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.modules import is_tied
from halfbyte.quant.affine import fake_quantise
from halfbyte.quant.hadamard import rotate
from halfbyte.quant.quant_linear import (
    InputScheme,
    PackedLinear,
    QuantLinear,
    SharedInput,
    pack_linear_,
    replace_linear_,
    set_parameters_,
)
from halfbyte.quant.quantisers.rtn import round_to_nearest

X, WEIGHT = torch.randn(112, 96, generator=torch.Generator().manual_seed(0)).split([12, 100])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "clip"), [(4, 0.8), (8, 1.0)])  # ranges are for four bits only
def test_the_input_is_rotated_then_rounded(symmetric, bits, clip):
    layer = QuantLinear(WEIGHT, torch.ones(100), InputScheme(True, None, 0.8, symmetric), SharedInput())
    assert torch.equal(layer(X), rotate(X) @ WEIGHT.T + 1)
    layer.a_bits = bits
    rounded = fake_quantise(rotate(X), bits, symmetric=symmetric, clip=clip)
    assert torch.allclose(layer(X), rounded @ WEIGHT.T + 1, atol=1e-4)


def both(dtype, bias=True, scheme=None):
    """A layer that keeps its weight decoded, and one that keeps it packed."""
    made = []
    for packed in (False, True):
        holder = torch.nn.ModuleDict({"a": torch.nn.Linear(96, 100, bias=bias).to(dtype)}).requires_grad_(False)
        if bias:
            holder["a"].bias.copy_(torch.linspace(-1, 1, 100))
        replace_linear_(holder, "a", round_to_nearest(WEIGHT, 32), SharedInput(), scheme, packed=packed)
        made.append(holder["a"])
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 4, torch.tensor([4] * 5 + [8] * 7, dtype=torch.int32)])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_say_the_same_bits(dtype, bits, bias):
    decoded, packed = both(dtype, bias, InputScheme(True, None, 0.9))
    assert isinstance(packed, PackedLinear)
    assert (packed.in_features, packed.out_features) == (decoded.in_features, decoded.out_features) == (96, 100)
    assert [name for name, _ in packed.named_parameters()] == ["bias"] * bias
    assert packed.weight.dtype == dtype
    assert torch.equal(packed.weight, decoded.weight)
    decoded.a_bits = packed.a_bits = bits
    assert torch.equal(packed(X.to(dtype)), decoded(X.to(dtype)))


def test_gradients_pass_a_packed_layer_and_its_decoded_weight_is_not_kept():
    gradients, kept = [], []
    for layer in both(torch.float32):
        x = X.clone().requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.dtype) or saved, lambda x: x):
            output = layer(x)
        output.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert kept == [torch.float32, torch.uint8, torch.float16]  # the decoded weight; codes and scales


def test_a_packed_layer_changes_its_compute_dtype_not_its_scales():
    decoded, packed = both(torch.float32)
    scales = packed.scales
    assert packed.to("cpu").scales is scales
    packed.to(torch.bfloat16)
    assert torch.equal(packed.scales, scales)
    assert packed.weight.dtype == packed.bias.dtype == torch.bfloat16
    assert torch.equal(packed.weight, decoded.to(torch.bfloat16).weight)
    assert torch.equal(packed.float().weight, both(torch.float32)[0].weight)


def test_a_layer_is_packed_in_its_place():
    holder = torch.nn.ModuleDict({"a": both(torch.bfloat16)[0]})
    decoded = holder["a"]
    decoded.a_bits = 4
    weight = round_to_nearest(WEIGHT, 32).pack()
    pack_linear_(holder, "a", weight)
    assert holder["a"].packed is weight.packed
    assert torch.equal(holder["a"](X.bfloat16()), decoded(X.bfloat16()))


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
