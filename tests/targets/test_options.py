"""What a target makes of the options: transforms, recipe, and what it refuses."""

from __future__ import annotations

import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.options import SearchOptions
from halfbyte.targets import TARGETS
from halfbyte.transforms import TRANSFORMS


def target_of(name):
    """A target, or one for vLLM by its GPU."""
    return TARGETS[name] if name in TARGETS else TARGETS["vllm"].on(name)


def expand(names, target, *, tied):
    return target_of(target).transforms(SearchOptions(transforms=names), tied=tied)


def recipe_for(target, **options):
    return target_of(target).recipe_for(SearchOptions(**options))


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
        ("auto", "hopper", False, ("smooth", "r1", "r2")),
        ("auto", "hopper", True, ("smooth", "r2")),
        ("auto", "ada", True, ("smooth", "online")),
    ],
)
def test_expand(names, target, tied, expected):
    assert expand(names, target, tied=tied) == expected


@pytest.mark.parametrize("name", ["r4", "online", "learned"])
def test_what_llamacpp_cannot_run_is_refused_with_what_it_can(name):
    with pytest.raises(HalfbyteError, match=rf"gguf cannot run.*expected smooth, r1, r2, got {name}.*--target sim"):
        expand(f"smooth,{name}", "gguf", tied=False)
    assert expand(name, "sim", tied=False) == (name,)


def test_what_vllm_rotates_at_run_time_depends_on_the_gpu():
    assert expand("online", "turing", tied=True) == ("online",)
    for name in ("r4", "learned"):
        with pytest.raises(HalfbyteError, match=f"vllm cannot run this transform.*got {name}"):
            expand(name, "ada", tied=True)
    with pytest.raises(HalfbyteError, match=r"vllm cannot run this transform.*got online"):
        expand("online", "hopper", tied=True)


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


def test_vllm_gets_what_its_kernels_compute():
    ada, hopper = recipe_for("sm89"), recipe_for("sm90")
    assert (ada.a_bits, ada.arithmetic, ada.rotation_block, ada.input_groups) == ((4, 8), "humming", 512, True)
    assert (hopper.a_bits, hopper.arithmetic, hopper.scale_bits, hopper.stream_bits) == ((8, 16), "cutlass", 8, 8)
    assert ada.scale_rule.bf16
    assert hopper.scale_rule.bf16
