"""Two walks in one: the original sees the unquantised stream, the copy what quantised blocks made of it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from halfbyte.calibration.walk import call_block, capture, walk_blocks

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
    for step in walk_blocks(source.model, source.family, tokens, device=source.device, batch=batch):
        step.observe(PARTS)
        step.split()
        for part in PARTS:  # "quantise" each layer after looking at its input
            pairs = [(original, of_copy) for original, of_copy, _ in step.inputs(part)]
            original, of_copy = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            found[f"model.layers.{step.index}.{part}"] = original, of_copy
            with torch.no_grad():
                step.quantised.get_submodule(part).weight.mul_(1.1)
    expected, of_copies = given_to(before, names, tokens), given_to(source.model, names, tokens)
    for name, (original, of_copy) in found.items():
        assert torch.allclose(original, expected[name], atol=1e-5), name
        assert torch.allclose(of_copy, of_copies[name], atol=1e-5), name
    assert not torch.allclose(*found["model.layers.1.mlp.down_proj"], atol=1e-2)
    assert torch.equal(found["model.layers.0.self_attn.q_proj"][0], found["model.layers.0.self_attn.q_proj"][1])


QKV, OUT, GATE, DOWN = PARTS


@pytest.mark.parametrize(
    ("order", "passes"),
    [
        (PARTS, 1),
        (PARTS[::-1], 4),
        ([OUT, OUT, GATE, DOWN], 2),
        ([OUT, QKV, GATE, DOWN], 4),
        ([OUT, GATE, OUT, DOWN], 2),
    ],
)
def test_attention_is_remembered_only_while_it_stays_the_same(tiny, order, passes):
    source = copy.deepcopy(tiny("qwen2"))
    tokens = torch.randint(source.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    known = capture(source.model, source.family, tokens, device=source.device)
    walk = walk_blocks(source.model, source.family, tokens, device=source.device)
    step = next(walk)
    step.observe(PARTS)
    step.split()
    values = []
    step.quantised.get_submodule("self_attn.v_proj").register_forward_pre_hook(lambda *_: values.append(1))
    attention = step.quantised.get_submodule("self_attn")
    for part in order:
        plain, expected = copy.deepcopy(step.quantised), []
        plain.get_submodule("self_attn.v_proj")._forward_pre_hooks.clear()
        plain.get_submodule(part).register_forward_pre_hook(
            lambda _, args, expected=expected: expected.append(args[0].flatten(0, -2))
        )
        for hidden in known.hidden:
            call_block(plain, hidden, known.kwargs)
        for (_, of_copy, _), wanted in zip(step.inputs(part), expected, strict=True):
            assert torch.allclose(of_copy, wanted, atol=1e-5), part
        with torch.no_grad():
            step.quantised.get_submodule(part).weight.mul_(1.1)
    expected = [call_block(step.quantised, hidden, known.kwargs) for hidden in known.hidden]
    del values[-len(expected) :]
    assert step.quantised.get_submodule("self_attn") is attention
    for (_, of_copy), wanted in zip(step.advance(), expected, strict=True):
        assert torch.allclose(of_copy, wanted, atol=1e-5)
    assert len(values) == passes * len(expected)


def test_the_walk_is_in_fp32_and_leaves_the_models_dtype(tiny):
    source = copy.deepcopy(tiny("llama"))
    source.model.to(torch.bfloat16)
    tokens = torch.randint(source.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    original = {name: parameter.clone() for name, parameter in source.model.named_parameters()}
    blocks, left = list(source.model.model.layers), []

    def leave(step):
        left.append((step.index, source.model.model.layers[step.index] is blocks[step.index]))

    for step in walk_blocks(source.model, source.family, tokens, device=source.device, leave=leave):
        step.observe(PARTS)
        assert {x.dtype for batches in step.seen.values() for x in batches} == {torch.float32}
        step.original.get_submodule("mlp.up_proj").weight.data.zero_()
        step.split()
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.bfloat16}
    assert left == [(0, True), (1, True)]  # each before its copy took the block's place
    for index, block in enumerate(blocks):  # which may be mapped from a file
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, original[f"model.layers.{index}.{name}"])


def test_a_block_is_free_when_its_copy_has_taken_its_place(tiny):
    source = copy.deepcopy(tiny("llama"))
    tokens = torch.randint(source.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    known = [weakref.ref(block.mlp.up_proj.weight) for block in source.model.model.layers]
    for step in walk_blocks(source.model, source.family, tokens, device=source.device):
        gc.collect()
        assert [weight() is not None for weight in known] == [index >= step.index for index in range(2)]
        step.observe(PARTS)
        step.split()
