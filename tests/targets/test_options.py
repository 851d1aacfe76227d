"""What a target makes of the options: transforms, recipe, and what it refuses."""

from __future__ import annotations

import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.options import SearchOptions
from halfbyte.targets import TARGETS
from halfbyte.transforms import TRANSFORMS


def expand(names, target, *, tied, online=False):
    options = SearchOptions(target=target, transforms=names, online_transforms=online)
    return TARGETS[target].transforms(options, tied=tied)


def recipe_for(target, **options):
    return TARGETS[target].recipe_for(SearchOptions(target=target, **options))


@pytest.mark.parametrize(
    ("names", "target", "tied", "expected"),
    [
        ("none", "gguf", False, ()),
        ("auto", "gguf", False, ("smooth", "r1", "r2")),
        ("auto", "gguf", True, ("smooth", "r2")),
        ("auto", "sim", False, ("smooth", "online", "learned")),
        ("auto", "sim", True, ("smooth", "online", "learned")),
        ("rotate", "gguf", True, ("r2",)),
        ("r1", "gguf", True, ("r1",)),  # by its own name also where it costs a second vocabulary matrix
        ("r2, smooth ,r2", "gguf", False, ("smooth", "r2")),  # in the order in which they are done, once
        ("r4,r2", "sim", False, ("r2", "r4")),
        ("auto", "vllm", False, ("smooth", "r1", "r2")),
        ("auto", "vllm", True, ("smooth", "r2")),
    ],
)
def test_expand(names, target, tied, expected):
    assert expand(names, target, tied=tied) == expected


@pytest.mark.parametrize("name", ["r4", "online", "learned"])
def test_what_llamacpp_cannot_run_is_refused_with_what_it_can(name):
    with pytest.raises(HalfbyteError, match=rf"gguf cannot run.*expected smooth, r1, r2, got {name}.*--target sim"):
        expand(f"smooth,{name}", "gguf", tied=False)
    assert expand(name, "sim", tied=False) == (name,)


def test_vllm_rotates_at_run_time_on_request():
    for names, expected in [("auto", ("smooth", "r2", "r4")), ("none", ("r4",)), ("r4,smooth", ("smooth", "r4"))]:
        assert expand(names, "vllm", tied=True, online=True) == expected
    with pytest.raises(HalfbyteError, match=r"on request only.*got r4; ask for it with --online_transforms"):
        expand("smooth,r4", "vllm", tied=True)
    for name in ("online", "learned"):
        with pytest.raises(HalfbyteError, match=f"vllm cannot run this transform.*got {name}"):
            expand(name, "vllm", tied=True, online=True)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(HalfbyteError, match="unknown transform") as stop:
        expand("smooth,rotated", "sim", tied=False)
    assert all(name in str(stop.value) for name in ("auto", "none", "rotate", *TRANSFORMS))


def test_alpha():
    assert recipe_for("sim").alpha is None
    assert [recipe_for("sim", alpha=text).alpha for text in ("0", "0.5", "1")] == [0.0, 0.5, 1.0]
    for text in ("1.5", "-0.1", "strong", "nan"):
        with pytest.raises(HalfbyteError, match=rf"--alpha: out of range, expected 0 to 1, or auto, got {text}"):
            recipe_for("sim", alpha=text)


def test_the_target_decides_which_activations_count():
    assert (recipe_for("sim").scale_bits, recipe_for("gguf").scale_bits) == (4, 8)  # llama.cpp: 8-bit activations
    assert recipe_for("sim", symmetric=True).symmetric


def test_vllm_gets_what_compressed_tensors_can_say():
    made = recipe_for("vllm")
    assert (made.symmetric, made.clip, made.scale_bits) == (True, False, 4)
    assert (made.scale_rule.bf16, made.scale_rule.signed) == (True, False)
    assert made.block_rotations
