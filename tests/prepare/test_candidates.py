"""Candidates of every matrix: errors are what they say, feedback lowers them, and a second run reads them back."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import listening
from halfbyte.models.modules import linear
from halfbyte.prepare import candidates
from halfbyte.prepare.candidates import encode_candidates_, menus_of
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.ggml.inputs import input_block, rounding_power
from halfbyte.quant.ggml.types import decode_tensor

CPU = torch.device("cpu")


def run(source, folder, weights="gptq", transforms=(), types=(), **more):
    folder.mkdir(exist_ok=True)
    tokens = torch.randint(source.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    menus = menus_of(source, 4.8, types)
    recipe = Recipe(transforms, weights, group_size=32, scale_bits=8)
    return menus, tokens, encode_candidates_(source, tokens, recipe, menus, folder, device=CPU, **more)


@pytest.mark.parametrize("family", ["qwen2-tied"])
def test_feedback_lowers_output_errors_and_never_raises_them(tiny, tmp_path, family):
    source = tiny(family)
    menus, _, plain = run(copy.deepcopy(source), tmp_path / "a", "rtn")
    _, _, better = run(copy.deepcopy(source), tmp_path / "b")
    ratios = []
    for menu in menus:
        for kind in menu.types:
            old, new = plain.errors[menu.name][kind], better.errors[menu.name][kind]
            assert new <= old * (1 + 1e-6), (menu.name, kind)
            if kind not in ("Q8_0", "F16"):
                ratios.append(new / old)
    assert sum(ratios) / len(ratios) < 0.9
    for errors in better.errors.values():
        first, *_, last = errors.values()
        assert first > last


def test_an_error_is_the_squared_output_error_per_token(tiny, tmp_path):
    source = copy.deepcopy(tiny("llama"))
    name = f"{source.family.blocks}.0.self_attn.q_proj"
    seen = []
    handle = source.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    menus, tokens, made = run(source, tmp_path / "a")
    seen.clear()
    with torch.no_grad():
        source.model(tokens)
    handle.remove()
    x, weight = seen[0].flatten(0, 1), linear(source.model, name).weight
    menu = next(menu for menu in menus if menu.name == name)
    for kind in menu.types:
        decoded = decode_tensor(made.encoded.rows(name, kind), kind)
        assert menu.nbytes(kind) == made.encoded.rows(name, kind).numel()
        changed = rounding_power([x], input_block(kind), x.device)  # by llama.cpp, in the inputs
        expected = float((x @ (decoded - weight).T).square().sum() / len(x) + (weight.square() @ changed).sum())
        assert made.errors[name][kind] == pytest.approx(expected, rel=1e-3)


def test_what_is_there_is_not_encoded_again(tiny, tmp_path, monkeypatch):
    source = tiny("qwen2")
    first, again = copy.deepcopy(source), copy.deepcopy(source)
    menus, tokens, made = run(first, tmp_path / "a", transforms=("smooth", "r2"))
    monkeypatch.setattr(candidates, "encode_", None)
    _, _, same = run(again, tmp_path / "a", transforms=("smooth", "r2"))
    assert made.errors == same.errors
    for menu in menus:
        assert torch.equal(made.encoded.rows(menu.name, menu.types[0]), same.encoded.rows(menu.name, menu.types[0]))
    with torch.no_grad():
        assert torch.equal(first.model(tokens).logits, again.model(tokens).logits)


def test_an_imatrix_is_not_for_inputs_that_a_rotation_mixes(tiny, tmp_path):
    source, told = tiny("qwen2"), []
    block = f"{source.family.blocks}.0"
    sizes = {f"{block}.self_attn.q_proj": 128, f"{block}.mlp.down_proj": 256}
    imatrix = {name: torch.logspace(0, 6, width) for name, width in sizes.items()}
    types = ("Q4_0",)
    with listening(told.append):
        _, _, plain = run(copy.deepcopy(source), tmp_path / "a", "rtn", ("r1",), types)
        assert not [progress for progress in told if progress.stage == "importance matrix"]
        _, _, other = run(copy.deepcopy(source), tmp_path / "b", "rtn", ("r1",), types, imatrix=imatrix)
    notes = [progress.note for progress in told if progress.stage == "importance matrix"]
    assert len(notes) == 1
    assert "measured for self_attn.q_proj, self_attn.k_proj" in notes[0]
    assert "down_proj" not in notes[0]
    same = [torch.equal(plain.encoded.rows(name, "Q4_0"), other.encoded.rows(name, "Q4_0")) for name in sizes]
    assert same == [True, False]


def test_menus_know_what_rows_can_hold(tiny):
    source = tiny("llama")  # rows of 128 and 256
    menus = {menu.name: menu for menu in menus_of(source, 4.8)}
    block = f"{source.family.blocks}.0"
    assert menus[f"{block}.self_attn.q_proj"].types == ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    assert menus[f"{block}.mlp.down_proj"].types == ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    low = {menu.name: menu for menu in menus_of(source, 3.0)}
    assert low[f"{block}.mlp.down_proj"].types[0] == "IQ2_XXS"
    assert low[f"{block}.self_attn.q_proj"].types[0] == "IQ4_NL"
    asked = menus_of(source, 4.8, ("Q4_0", "Q8_0"))
    assert {menu.types for menu in asked} == {("Q4_0", "Q8_0")}
    with pytest.raises(HalfbyteError, match="no type fits"):
        menus_of(source, 4.8, ("Q4_K",))


def test_f16_is_a_type_too(tiny, tmp_path):
    menus, _, made = run(copy.deepcopy(tiny("llama")), tmp_path / "a", types=("F16",))
    own = next(menu for menu in menus if menu.name.endswith("layers.0.mlp.down_proj"))
    decoded = decode_tensor(made.encoded.rows(own.name, "F16"), "F16")
    assert torch.equal(decoded, linear(tiny("llama").model, own.name).weight.half().float())


def test_an_imatrix_of_the_head_is_used(tiny, tmp_path):
    source = tiny("qwen2")
    imatrix = {source.family.head: torch.logspace(0, 4, source.config.hidden_size)}
    rows = [
        run(copy.deepcopy(source), tmp_path / name, "rtn", types=("Q4_1",), imatrix=importance)[2].encoded
        for name, importance in (("a", None), ("b", imatrix))
    ]
    heads, downs = zip(
        *((one.rows(source.family.head, "Q4_1"), one.rows("model.layers.1.mlp.down_proj", "Q4_1")) for one in rows),
        strict=True,
    )
    assert not torch.equal(*heads)
    assert torch.equal(*downs)
