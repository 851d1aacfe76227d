"""Preparation with a checkpoint's codes: the simulation is the checkpoint, whatever was folded into it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import kl_per_token
from halfbyte.models.checkpoint import CheckpointCodes, QuantisedFolder
from halfbyte.models.layers import layers_of, units_of
from halfbyte.models.modules import linear
from halfbyte.prepare import checkpoint as limits
from halfbyte.prepare.recipe import A4_CLIPS, Recipe
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.affine import fake_quantise
from halfbyte.quant.int4 import ANY_FP16, ScaleRule
from halfbyte.quant.quant_linear import PackedLinear, QuantLinear, set_activation_bits_, set_parameters_
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.reference import reference
from tests.folding import CPU, TOKENS, fold_, logits
from tests.quantised_folders import Checkpoint, compressed, compressed_config, gptq, gptq_config

ALL = "r1,r2,smooth"


@pytest.fixture(scope="module")
def folded(tiny, tmp_path_factory):
    """(the unquantised source, the checkpoint as a float model with decoded weights, the checkpoint), made once."""
    made = {}

    def get(family, folds):
        if (family, folds) not in made:
            source = tiny(family)
            checkpoint = Checkpoint(source.origin.folder)
            with torch.no_grad():
                fold_(checkpoint.model, source.family, folds)
            folder = tmp_path_factory.mktemp("folded") / "m"
            form = (gptq(), gptq_config()) if family == "llama" else (compressed, compressed_config())
            checkpoint.write(folder, *form)
            direct = copy.deepcopy(checkpoint.model)
            set_parameters_(direct, {f"{layer}.weight": checkpoint.decoded(layer) for layer in checkpoint.layers()})
            made[family, folds] = source, direct, checkpoint
            checkpoint.folder = folder
        return made[family, folds]

    return get


def prepared(source, folder, rule=ANY_FP16, **more):
    own = replace(source, model=copy.deepcopy(source.model))
    codes = CheckpointCodes(QuantisedFolder(folder), own, rule)
    return own, prepare_(own, TOKENS, Recipe(group_size=32), device=CPU, checkpoint=codes, **more)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("family", "folds"), [("llama", "smooth"), ("qwen2", ""), ("qwen2", ALL)])
def test_the_simulation_is_the_checkpoint(folded, family, folds, packed):
    source, direct, checkpoint = folded(family, folds)
    own, made = prepared(source, checkpoint.folder, packed=packed)
    for layer in checkpoint.layers():
        assert torch.equal(made.codes.weights[layer].decode(), checkpoint.decoded(layer))
        assert isinstance(own.model.get_submodule(layer), PackedLinear if packed else QuantLinear)
    assert torch.equal(logits(own.model), logits(direct))
    assert (made.codes.parameters == {}) == (folds == "")
    assert {entry.a4_clip for entry in made.layers.values()} <= set(A4_CLIPS)
    assert list(made.layers) == [layer.name for layer in layers_of(source.model, source.family)]


@pytest.mark.parametrize("folds", ["", ALL])
def test_errors_are_those_of_activations_alone(folded, folds):
    """Against the checkpoint's own layer on its own unrounded input."""
    source, direct, checkpoint = folded("qwen2", folds)
    _, made = prepared(source, checkpoint.folder)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
        layer, seen = f"model.layers.1.{name}", []
        module = direct.get_submodule(layer)
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        logits(direct)
        handle.remove()
        x, decoded, row = seen[0].detach(), checkpoint.decoded(layer), made.sensitivity[layer]
        for bits, clip, got in ((4, made.layers[layer].a4_clip, row.mse_low), (8, 1.0, row.mse_high)):
            noise = fake_quantise(x, bits, clip=clip) - x
            assert got == pytest.approx(float((noise @ decoded.T).square().mean()), rel=0.01), (layer, bits)
        assert row.power == pytest.approx(float((x @ decoded.T).square().mean()), rel=1e-3)


@pytest.mark.parametrize("folds", ["", ALL])
def test_kl_is_to_the_original_and_counts_the_head_of_the_checkpoint(folded, folds):
    source, _, checkpoint = folded("qwen2", folds)
    answers = reference(source.model, source.family, TOKENS, device=CPU)
    own, made = prepared(source, checkpoint.folder)
    heads = [linear(model, source.family.head).weight for model in (source.model, own.model)]
    units = units_of(layers_of(source.model, source.family), source.family, "fused")
    evaluator = KLEvaluator(own.model, own.family, units, TOKENS, answers.for_head(*heads) if folds else answers)
    score = evaluator.score((1,) * len(units))  # A8
    set_activation_bits_(own.model, dict.fromkeys(made.layers, 8))
    assert score == pytest.approx(float(kl_per_token(logits(source.model), logits(own.model)).mean()), rel=1e-3)


def test_a_checkpoint_of_another_model(tiny, folded, monkeypatch):
    """What the checkpoint says tells them apart: the tiny models are alike, so the limit is lower here."""
    source, direct, checkpoint = folded("llama", "smooth")
    other = tiny("llama", seed_of_weights=1)
    apart = float(kl_per_token(logits(other.model), logits(direct)).mean())
    assert float(kl_per_token(logits(source.model), logits(direct)).mean()) < apart / 4
    monkeypatch.setattr(limits, "LARGEST_KL", apart / 2)
    prepared(source, checkpoint.folder)
    with pytest.raises(HalfbyteError, match=r"the checkpoint is of another model, expected a KL of at most"):
        prepared(other, checkpoint.folder)


def test_scales_are_what_the_target_computes_with(folded):
    source, _, checkpoint = folded("llama", "smooth")
    _, made = prepared(source, checkpoint.folder, ScaleRule(bf16=True, signed=False))
    for weight in made.codes.weights.values():
        assert torch.equal(weight.scales.float(), weight.scales.bfloat16().float())
    assert all("not exact in bf16" in entry.note for entry in made.layers.values())


def test_dead_parts_are_no_obstacle(tiny, tmp_path):
    source = tiny("llama")
    own, checkpoint = replace(source, model=copy.deepcopy(source.model)), Checkpoint(source.origin.folder)
    with torch.no_grad():
        for model in (own.model, checkpoint.model):
            layer = model.model.layers[0]
            layer.input_layernorm.weight[:3] = 0
            layer.self_attn.v_proj.weight[:40] = 0  # more than a head
            layer.mlp.down_proj.weight.zero_()
    _, made = prepared(own, checkpoint.write(tmp_path / "m", gptq(), gptq_config()))
    assert all(row.mse_high <= row.mse_low < float("inf") for row in made.sensitivity.values())
