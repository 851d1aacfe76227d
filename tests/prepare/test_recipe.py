"""What a recipe applies."""

from __future__ import annotations

from halfbyte.prepare.recipe import Recipe


def test_what_is_applied():
    def names(recipe):
        return [type(transform).__name__ for transform in recipe.applied]

    assert names(Recipe(("r2", "smooth", "r1"))) == ["Smooth", "R1", "R2"]  # in their order, not in that of the names
    assert names(Recipe((), "awq")) == ["Smooth"]  # brings its own channel scales
    assert names(Recipe(("smooth",), "awq")) == ["Smooth"]
    assert names(Recipe(("r1",), "gptq")) == ["R1"]
