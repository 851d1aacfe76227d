"""Rotations and the learned transform: the unquantised model says the same, and outliers are spread."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.models.modules import is_tied
from halfbyte.prepare.simulation import become_simulation_
from halfbyte.quant.balance import low_rank_balance
from halfbyte.quant.hadamard import rotate
from halfbyte.quant.quant_linear import InputScheme
from tests.tiny_models import FAMILIES

NAMES = ["r1", "r2", "online", "smooth,r1,r2,r4", "smooth,r2,online,learned"]
IDS = torch.randint(800, (2, 40), generator=torch.Generator().manual_seed(0))


def logits(source):
    with torch.no_grad():
        return source.model(IDS).logits


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("family", [*FAMILIES, "llama with biases"])
def test_function_is_preserved(tiny, family, names, transformed):
    changes = {"attention_bias": True, "mlp_bias": True} if "biases" in family else {}
    known = tiny(family.removesuffix(" with biases"), **changes)
    source, before = copy.deepcopy(known), logits(known)
    made = transformed(source, IDS, names)
    after = logits(source)
    assert 0 < float((after - before).norm() / before.norm()) < 1e-4
    fresh = copy.deepcopy(known)  # the codes file holds all that has changed
    become_simulation_(fresh, made.codes, made.layers)
    assert torch.equal(logits(fresh), after)
    entries = made.layers.values()
    assert {name.rpartition(".")[2] for name, entry in made.layers.items() if entry.rotated} == (
        {name.rpartition(".")[2] for name in made.layers}
        if "online" in names
        else {"down_proj"}
        if "r4" in names
        else set()
    )
    assert all(bool(entry.rank) == ("learned" in names) for entry in entries)


@pytest.mark.parametrize("family", ["qwen2", "llama-tied"])
def test_r1_rotates_the_stream_and_empties_the_norms(tiny, family, transformed):
    source = copy.deepcopy(tiny(family))
    stream = source.model.model.embed_tokens.weight.clone()
    transformed(source, IDS, "r1")
    assert torch.equal(source.model.model.embed_tokens.weight, rotate(stream))
    assert not is_tied(source.model, source.family)
    for name, parameter in source.model.named_parameters():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def spread(source, name):
    """Largest over median magnitude of the channels that the linear layer ``name`` multiplies."""
    seen = []
    layer = source.model.get_submodule(name)
    treat = layer.scheme.transform if hasattr(layer, "scheme") else lambda x: x
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(treat(args[0]).flatten(0, -2)))
    logits(source)
    handle.remove()
    largest = seen[0].abs().amax(dim=0)
    return float(largest.max() / largest.median())


@pytest.mark.parametrize(
    ("names", "part"),
    [("r1", "self_attn.q_proj"), ("r2", "self_attn.o_proj"), ("r4", "mlp.down_proj"), ("online", "self_attn.q_proj")],
)
def test_outliers_are_spread(tiny, names, part, transformed):
    source = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        source.model.model.embed_tokens.weight[:, 5] *= 100
        for block in source.model.model.layers:
            block.self_attn.v_proj.weight[5] *= 100
            block.mlp.up_proj.weight[5] *= 100
    before = spread(source, f"model.layers.0.{part}")
    transformed(source, IDS, names)
    assert spread(source, f"model.layers.0.{part}") < before / 4


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_stored_weights_undo_what_happens_to_the_input(rank, rotated):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 7, 96, generator=generator), torch.randn(40, 96, generator=generator)
    moments = x.flatten(0, 1).T @ x.flatten(0, 1), weight.T @ weight
    scheme = InputScheme(rotated, low_rank_balance(*moments, rank) if rank else None)
    expected, got = x @ weight.T, scheme.transform(x) @ scheme.stored_weight(weight).T
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(scheme.transform(x), x) != scheme.changes_input
