"""Preparation as a whole: the model becomes what is saved, and better quantisers make better models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import kl_per_token
from halfbyte.models.layers import layers_of
from halfbyte.prepare import walk
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import load_prepared_, prepare_, save_prepared
from halfbyte.quant import quant_linear as surgery
from halfbyte.quant.quant_linear import PackedLinear, QuantLinear, set_activation_bits_
from halfbyte.workdir import Workdir

CALIB, HELD_OUT = torch.randint(800, (40, 64), generator=torch.Generator().manual_seed(0)).split([32, 8])
ALL = ("smooth", "r2", "online", "learned")
RECIPES = {
    "plain": Recipe(),
    "GGUF": Recipe(("smooth", "r1", "r2"), "gptq", scale_bits=8),
    "AWQ": Recipe((), "awq"),
    "everything": Recipe(ALL, "gptq", group_size=32),
    "symmetric": Recipe(("r4",), "awq", alpha=0.5, symmetric=True),
}


def logits(source):
    with torch.no_grad():
        return source.model(HELD_OUT).logits


def prepared(tiny, family, recipe, windows=2, dtype=torch.float32, packed=False):
    source = copy.deepcopy(tiny(family))
    source.model.to(dtype)
    return source, prepare_(source, CALIB[:windows], recipe, device=source.device, packed=packed)


@pytest.mark.parametrize("family", ["qwen2-tied", "llama"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_saved_is_the_model(tiny, tmp_path, family, name):
    source, made = prepared(tiny, family, RECIPES[name])
    layers = layers_of(tiny(family).model, source.family)
    assert list(made.layers) == list(made.codes.weights) == [layer.name for layer in layers]
    for layer in layers:
        module = source.model.get_submodule(layer.name)
        assert isinstance(module, QuantLinear)
        assert torch.equal(module.weight, made.codes.weights[layer.name].decode())
        assert made.layers[layer.name].a_symmetric == module.scheme.symmetric == (name == "symmetric")
    stages = Workdir(tmp_path / "plan.pt", {}, resume=False)
    save_prepared(stages, made)
    fresh = copy.deepcopy(tiny(family))
    again = load_prepared_(fresh, stages, RECIPES[name], device=fresh.device)
    assert again.layers == made.layers
    assert again.sensitivity == made.sensitivity
    assert again.scales == made.scales
    assert torch.equal(logits(fresh), logits(source))  # a resumed search starts from the same model
    for bits in (4, 8):
        for model in (fresh.model, source.model):
            set_activation_bits_(model, dict.fromkeys(made.layers, bits))
        assert torch.equal(logits(fresh), logits(source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GGUF", "everything"])
def test_a_packed_model_says_the_same_bits(tiny, tmp_path, name, dtype):
    decoded, made = prepared(tiny, "qwen2-tied", RECIPES[name], dtype=dtype)
    packed, again = prepared(tiny, "qwen2-tied", RECIPES[name], dtype=dtype, packed=True)
    assert again.layers == made.layers
    assert again.sensitivity == made.sensitivity
    stages = Workdir(tmp_path / "plan.pt", {}, resume=False)
    save_prepared(stages, again)
    resumed = copy.deepcopy(tiny("qwen2-tied"))
    resumed.model.to(dtype)
    loaded = load_prepared_(resumed, stages, RECIPES[name], device=resumed.device, packed=True)
    for model, codes in ((packed.model, again.codes), (resumed.model, loaded.codes)):
        for layer, weight in codes.weights.items():
            module = model.get_submodule(layer)
            assert isinstance(module, PackedLinear)
            assert module.packed.data_ptr() == weight.packed.data_ptr()  # not a second copy
            assert module.scales.data_ptr() == weight.scales.data_ptr()
    for bits in (None, 4, 8):
        for source in (decoded, packed, resumed):
            set_activation_bits_(source.model, dict.fromkeys(made.layers, bits))
        assert torch.equal(logits(packed), logits(decoded))
        assert torch.equal(logits(resumed), logits(decoded))


def test_what_cannot_be_packed_is_refused_before_the_work(tiny, monkeypatch):
    source = tiny("llama", intermediate_size=255)
    monkeypatch.setattr(walk, "walk_blocks", None)
    with pytest.raises(HalfbyteError, match=r"layers\.0\.mlp\.down_proj: an odd number of inputs"):
        prepare_(source, CALIB[:2], Recipe(), device=source.device)


def test_nothing_is_loaded_before_it_is_complete(tiny, tmp_path):
    source, made = prepared(tiny, "llama", Recipe())
    stages = Workdir(tmp_path / "plan.pt", {}, resume=False)
    assert load_prepared_(source, stages, Recipe(), device=source.device) is None
    save_prepared(stages, made)
    stages.codes.unlink()
    assert load_prepared_(source, stages, Recipe(), device=source.device) is None


def kl(tiny, family, recipe, bits):
    source, made = prepared(tiny, family, recipe, windows=32)
    set_activation_bits_(source.model, dict.fromkeys(made.layers, bits))
    return float(kl_per_token(logits(tiny(family)), logits(source)).mean())


def test_quantisers_in_order(tiny):
    """On text that was not calibrated on, weights alone."""
    found = {name: kl(tiny, "qwen3", Recipe((), name), None) for name in ("gptq", "awq", "rtn")}
    assert found["gptq"] < 0.9 * found["awq"]
    assert found["awq"] < 0.9 * found["rtn"]


@pytest.mark.parametrize("transforms", [("online",), ("smooth", "online", "learned")])
def test_transforms_help_four_bit_activations(tiny, transforms):
    assert kl(tiny, "qwen3", Recipe(transforms, "gptq"), 4) < 0.95 * kl(tiny, "qwen3", Recipe((), "gptq"), 4)


def test_a_common_input_is_treated_once(tiny, monkeypatch):
    source, made = prepared(tiny, "llama", Recipe(ALL))
    set_activation_bits_(source.model, dict.fromkeys(made.layers, 8))
    calls, real = [], surgery.rotate
    monkeypatch.setattr(surgery, "rotate", lambda x: calls.append(x.shape) or real(x))
    logits(source)
    assert len(calls) == 2 * 4  # blocks, units


def test_without_transforms_no_parameter_is_saved(tiny):
    assert prepared(tiny, "qwen2", Recipe((), "gptq"))[1].codes.parameters == {}
    saved = prepared(tiny, "qwen2-tied", Recipe(("r1",)))[1].codes.parameters
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(saved)


def test_what_went_otherwise_is_noted(tiny):
    source = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        source.model.get_submodule("model.layers.1.input_layernorm").weight.zero_()
    made = prepare_(source, CALIB[:2], Recipe((), "gptq", group_size=96), device=source.device)
    group, dead = "group 64: 96 does not divide 128", "rounded to nearest: the Hessian is not positive definite"
    assert made.layers["model.layers.0.self_attn.q_proj"].note == group
    assert made.layers["model.layers.1.self_attn.q_proj"].note == f"{dead}; {group}"


@pytest.mark.parametrize("dead", ["input_layernorm", "self_attn.o_proj", "mlp.up_proj"])
@pytest.mark.parametrize("weights", ["gptq", "awq"])
def test_dead_parts_are_no_obstacle(tiny, dead, weights):
    """A norm or a layer of zeros, as pruned models have them."""
    source = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        source.model.get_submodule(f"model.layers.0.{dead}").weight.zero_()
    before = logits(source)
    for transforms in (("smooth", "r1", "r2"), ALL):
        model = replace(source, model=copy.deepcopy(source.model))
        made = prepare_(model, CALIB[:2], Recipe(transforms, weights), device=source.device)
        set_activation_bits_(model.model, dict.fromkeys(made.layers, 8))
        assert float(kl_per_token(before, logits(model)).mean()) < 0.3
