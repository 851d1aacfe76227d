"""Two walks in one: the original sees the unquantised stream, the copy what quantised blocks made of it."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.calibration.twins import walk_twins

PARTS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def given_to(model, names, tokens):
    """What linear layers are given in whole forward passes, ``[tokens, in]`` each."""
    seen, handles = {}, []
    for name in names:
        keep = lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    for window in tokens:
        model(window.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_both_inputs_are_those_of_whole_models(tiny, batch):
    source = copy.deepcopy(tiny("qwen2"))
    tokens = torch.randint(source.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(source.model)
    names = [f"model.layers.{index}.{part}" for index in range(2) for part in PARTS]
    found = {}
    for step in walk_twins(source.model, source.family, tokens, device=source.device, batch=batch):
        step.observe(PARTS)
        step.split()
        for part in PARTS:  # "quantise" each layer after looking at its input
            original, of_copy = (torch.cat(parts) for parts in zip(*step.inputs(part), strict=True))
            found[f"model.layers.{step.index}.{part}"] = original, of_copy
            with torch.no_grad():
                step.quantised.get_submodule(part).weight.mul_(1.1)
    expected, of_copies = given_to(before, names, tokens), given_to(source.model, names, tokens)
    for name, (original, of_copy) in found.items():
        assert torch.allclose(original, expected[name], atol=1e-5), name
        assert torch.allclose(of_copy, of_copies[name], atol=1e-5), name
    assert not torch.allclose(*found["model.layers.1.mlp.down_proj"], atol=1e-2)
    assert torch.equal(found["model.layers.0.self_attn.q_proj"][0], found["model.layers.0.self_attn.q_proj"][1])


def test_the_walk_is_in_fp32_and_leaves_the_models_dtype(tiny):
    source = copy.deepcopy(tiny("llama"))
    source.model.to(torch.bfloat16)
    tokens = torch.randint(source.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    for step in walk_twins(source.model, source.family, tokens, device=source.device):
        step.observe(PARTS)
        assert {x.dtype for batches in step.seen.values() for x in batches} == {torch.float32}
        step.split()
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.bfloat16}
