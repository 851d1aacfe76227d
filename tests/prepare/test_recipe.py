"""Options as a recipe."""

from __future__ import annotations

import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.options import SearchOptions
from halfbyte.prepare.recipe import Recipe, parse_alpha, recipe_of


def test_alpha():
    assert parse_alpha("auto") is None
    assert [parse_alpha(text) for text in ("0", "0.5", "1")] == [0.0, 0.5, 1.0]
    for text in ("1.5", "-0.1", "strong", "nan"):
        with pytest.raises(HalfbyteError, match=rf"--alpha: out of range, expected 0 to 1, or auto, got {text}"):
            parse_alpha(text)


def test_the_target_decides_which_activations_count():
    sim, gguf = (recipe_of(SearchOptions(target=target), tied=True) for target in ("sim", "gguf"))
    assert (sim.scale_bits, gguf.scale_bits) == (4, 8)  # llama.cpp computes with 8-bit activations
    assert gguf.transforms == ("smooth", "r2")
    assert recipe_of(SearchOptions(target="sim", symmetric=True), tied=True).symmetric


def test_vllm_gets_what_compressed_tensors_can_say():
    made = recipe_of(SearchOptions(target="vllm", online_transforms=True), tied=True)
    assert (made.symmetric, made.clip, made.scale_bits) == (True, False, 4)
    assert (made.scale_rule.bf16, made.scale_rule.signed) == (True, False)
    assert made.block_rotations
    assert made.transforms == ("smooth", "r2", "r4")


def test_what_is_applied():
    def names(recipe):
        return [type(transform).__name__ for transform in recipe.applied]

    assert names(Recipe(("r2", "smooth", "r1"))) == ["Smooth", "R1", "R2"]  # in their order, not in that of the names
    assert names(Recipe((), "awq")) == ["Smooth"]  # brings its own channel scales
    assert names(Recipe(("smooth",), "awq")) == ["Smooth"]
    assert names(Recipe(("r1",), "gptq")) == ["R1"]
