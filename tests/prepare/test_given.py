"""Preparation with a checkpoint's codes, whatever was folded into them.

The simulation is the checkpoint, and errors are measured in its own coordinates.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import kl_per_token
from halfbyte.models.checkpoint import QuantisedFolder
from halfbyte.models.layers import layers_of, units_of
from halfbyte.models.modules import blocks, linear
from halfbyte.prepare.checkpoint import adopt_block_, adopt_ends_, given_codes
from halfbyte.prepare.recipe import A4_CLIPS, Recipe
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.affine import fake_quantise
from halfbyte.quant.int4 import ANY_FP16
from halfbyte.quant.quant_linear import QuantLinear, set_activation_bits_, set_parameters_
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.reference import reference
from tests.folding import CPU, TOKENS, fold_, logits
from tests.quantised_folders import Checkpoint, compressed, compressed_config, gptq, gptq_config

ALL = "r1,r2,smooth"
CASES = [("llama", "norms"), ("llama", "r2"), ("qwen2", ""), ("qwen2", "smooth"), ("qwen2", ALL)]


@pytest.fixture(scope="module")
def folded(tiny, tmp_path_factory):
    """(the unquantised source, float model as it was folded, checkpoint), made once."""
    made = {}

    def get(family, folds):
        if (family, folds) not in made:
            source = tiny(family)
            checkpoint = Checkpoint(source.origin.folder)
            with torch.no_grad():
                fold_(checkpoint.model, source.family, folds)
            assert torch.allclose(logits(checkpoint.model), logits(source.model), atol=1e-3)
            folder = tmp_path_factory.mktemp("folded") / "m"
            form = (gptq(), gptq_config()) if family == "llama" else (compressed, compressed_config())
            made[family, folds] = source, checkpoint, checkpoint.write(folder, *form)
        return made[family, folds]

    return get


def opened(source, folder, rule=ANY_FP16):
    return given_codes(QuantisedFolder(folder), source, rule, device=CPU)


def prepared(source, folder, **recipe):
    own = replace(source, model=copy.deepcopy(source.model))
    return own, prepare_(own, TOKENS, Recipe(group_size=32, **recipe), device=CPU, given=opened(source, folder))


@pytest.mark.parametrize(("family", "folds"), [*CASES, ("qwen3", ""), ("qwen3", ALL)])
def test_a_block_is_brought_into_the_coordinates_of_its_codes(folded, family, folds):
    """With the same function as before, and with the weights that were rounded."""
    source, checkpoint, folder = folded(family, folds)
    given = opened(source, folder)
    assert (given.turn is not None) == ("r1" in folds)
    own = replace(source, model=copy.deepcopy(source.model))
    before, share = logits(source.model), 0.7 if family == "qwen3" else 0.3  # its head is as wide as the model
    adopt_ends_(own, given)
    for index, block in enumerate(blocks(own.model, own.family)):
        codes = adopt_block_(block, index, own, given)
        for part, weight in codes.items():
            name = f"{own.family.blocks}.{index}.{part}"
            assert torch.equal(weight.decode(), checkpoint.decoded(name))
            folded_weight, mine = checkpoint.model.get_submodule(name).weight, linear(block, part).weight
            rounding = (checkpoint.decoded(name) - folded_weight).square().sum()
            assert (mine - folded_weight).square().sum() < share * rounding, part
            if not folds:
                assert torch.equal(mine, source.model.get_submodule(name).weight)
    assert torch.allclose(logits(own.model), before, atol=2e-3)


@pytest.mark.parametrize(("family", "folds"), CASES)
def test_the_simulation_is_the_checkpoint(folded, family, folds):
    source, checkpoint, folder = folded(family, folds)
    own, made = prepared(source, folder)
    direct = copy.deepcopy(checkpoint.model)
    for layer in checkpoint.layers():
        assert torch.equal(made.codes.weights[layer].decode(), checkpoint.decoded(layer))
        set_parameters_(direct, {f"{layer}.weight": checkpoint.decoded(layer)})
        assert isinstance(own.model.get_submodule(layer), QuantLinear)
    assert torch.equal(logits(own.model), logits(direct))
    assert (made.codes.parameters == {}) == (folds == "" or (folds == "r2" and family == "llama"))
    assert {entry.a4_clip for entry in made.layers.values()} <= set(A4_CLIPS)
    assert list(made.layers) == [layer.name for layer in layers_of(source.model, source.family)]


@pytest.mark.parametrize("folds", ["", "smooth", ALL])
def test_errors_are_those_of_the_folded_model(folded, folds):
    """Against the float model as it was folded: the unquantised layer on the unquantised input."""
    source, checkpoint, folder = folded("qwen2", folds)
    _, made = prepared(source, folder)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        layer, seen = f"model.layers.1.{name}", []
        module = checkpoint.model.get_submodule(layer)
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        logits(checkpoint.model)
        handle.remove()
        x, decoded, entry = seen[0].detach(), checkpoint.decoded(layer), made.layers[layer]
        expected, row = x @ module.weight.detach().T, made.sensitivity[layer]
        for bits, clip, got in ((4, entry.a4_clip, row.mse_a4), (8, 1.0, row.mse_a8)):
            direct = float((fake_quantise(x, bits, clip=clip) @ decoded.T - expected).square().mean())
            assert got == pytest.approx(direct, rel=0.25), (layer, bits)  # frames are found from rounded weights
        assert row.power == pytest.approx(float(expected.square().mean()), rel=0.06)


@pytest.mark.parametrize(("family", "folds"), [("qwen2", ""), ("llama", "norms")])
def test_without_estimates_the_errors_are_exact(folded, family, folds):
    source, _, folder = folded(family, folds)
    _, made = prepared(source, folder, clip=False)
    layer = "model.layers.0.self_attn.q_proj"  # its input is that of the embedding
    norm = source.model.model.layers[0].input_layernorm
    with torch.no_grad():
        x = norm(source.model.model.embed_tokens(TOKENS)).flatten(0, 1)
    scales = norm.weight / made.codes.parameters.get("model.layers.0.input_layernorm.weight", norm.weight)
    direct = (
        fake_quantise(x / scales, 4) @ made.codes.weights[layer].decode().T
        - x @ source.model.get_submodule(layer).weight.T
    )
    assert made.sensitivity[layer].mse_a4 == pytest.approx(float(direct.square().mean()), rel=1e-3)


@pytest.mark.parametrize("folds", ["", ALL])
def test_kl_counts_the_head_of_the_checkpoint(folded, folds):
    source, _, folder = folded("qwen2", folds)
    known = reference(source.model, source.family, TOKENS, device=CPU)
    own, made = prepared(source, folder)
    if folds:
        known = known.for_head(
            linear(source.model, source.family.head).weight, linear(own.model, own.family.head).weight
        )
    units = units_of(layers_of(source.model, source.family), source.family, "fused")
    score = KLEvaluator(own.model, own.family, units, TOKENS, known).score((8,) * len(units))
    set_activation_bits_(own.model, dict.fromkeys(made.layers, 8))
    assert score == pytest.approx(float(kl_per_token(logits(source.model), logits(own.model)).mean()), rel=1e-3)


def test_a_checkpoint_of_another_model(tiny, folded, tmp_path):
    _, _, folder = folded("llama", "r2")
    with pytest.raises(HalfbyteError, match=r"embed_tokens\.weight: the checkpoint is of another model"):
        opened(tiny("llama", seed_of_weights=1), folder)
    source = tiny("llama")
    for part in ("q_proj", "down_proj"):
        checkpoint = Checkpoint(source.origin.folder)
        (layer,) = [name for name in checkpoint.layers() if name.endswith(part) and ".1." in name]
        with torch.no_grad():
            checkpoint.model.get_submodule(layer).weight.mul_(-1)
        with pytest.raises(HalfbyteError, match=f"{part}: the checkpoint's weights are not the model's"):
            opened(source, checkpoint.write(tmp_path / part, gptq(), gptq_config()))


def test_dead_parts_are_no_obstacle(tiny, tmp_path):
    source = tiny("llama")
    own, checkpoint = replace(source, model=copy.deepcopy(source.model)), Checkpoint(source.origin.folder)
    with torch.no_grad():
        for model in (own.model, checkpoint.model):
            layer = model.model.layers[0]
            layer.input_layernorm.weight[:3] = 0
            layer.self_attn.v_proj.weight[:40] = 0  # more than a head
            layer.mlp.up_proj.weight[:7] = 0
            layer.mlp.down_proj.weight.zero_()
    _, made = prepared(own, checkpoint.write(tmp_path / "m", gptq(), gptq_config()))
    assert all(row.mse_a8 <= row.mse_a4 < float("inf") for row in made.sensitivity.values())
