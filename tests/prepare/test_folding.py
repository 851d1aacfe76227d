"""What preparation folded is made again from the plan: the weights that were quantised, and the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.modules import blocks
from halfbyte.plan import load_codes, save_codes
from halfbyte.prepare.folding import CPU, TransformedBlocks
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.quant_linear import set_parameters_
from halfbyte.transforms._rotation import rotate_ends_
from tests.tiny_models import logits_of, some_ids

IDS = torch.randint(800, (2, 40), generator=torch.Generator().manual_seed(0))
ROUNDING = 1e-5  # of fp32
SAME = 1e-4


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("names", ["smooth", "r2", "smooth,r1,r2"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "llama-tied"])
def test_weights_are_those_that_were_quantised(tiny, transformed, family, names):
    source = tiny(family)
    made = transformed(copy.deepcopy(source), IDS, names)
    again = TransformedBlocks(source, Recipe(tuple(names.split(","))), made.codes.channel_scales, where="plan")
    assert bool(made.codes.channel_scales) == ("smooth" in names)
    for name, weight in made.codes.weights.items():
        assert relative(again.weight(name), weight.decode()) < ROUNDING, name


@pytest.mark.parametrize("weights", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_function_is_preserved_with_the_parameters_of_the_codes_file(tiny, tmp_path, family, weights):
    """AWQ brings channel scales of its own."""
    known = tiny(family)
    recipe = Recipe(("smooth", "r1", "r2") if weights == "gptq" else ("r2",), weights)
    made = prepare_(copy.deepcopy(known), IDS, recipe, device=CPU)
    save_codes(tmp_path / "c.safetensors", made.codes)
    codes = load_codes(tmp_path / "c.safetensors")
    again = TransformedBlocks(known, recipe, codes.channel_scales, where="plan")
    source = copy.deepcopy(known)
    if "r1" in recipe.transforms:
        rotate_ends_(source.model, source.family, CPU)
    for index, block in enumerate(blocks(source.model, source.family)):
        for part in source.family.linears:
            name = f"{source.family.blocks}.{index}.{part}"
            block.get_submodule(part).weight = nn.Parameter(again.weight(name), requires_grad=False)
    set_parameters_(source.model, codes.parameters)
    ids = some_ids(known)
    assert 0 < relative(logits_of(source.model, ids), logits_of(known.model, ids)) < SAME


def test_what_cannot_be_made_again_is_refused(tiny):
    with pytest.raises(HalfbyteError, match=r"plan: the codes file has no channel scales.*q_proj.*--policy exact"):
        TransformedBlocks(tiny("llama"), Recipe(("smooth",)), {}, where="plan")
    with pytest.raises(HalfbyteError, match="plan: the transform learned cannot be made again"):
        TransformedBlocks(tiny("llama"), Recipe(("r2", "learned")), {}, where="plan")
