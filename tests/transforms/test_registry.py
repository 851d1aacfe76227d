"""What ``--transforms`` means for each target, and what is refused."""

from __future__ import annotations

import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.transforms import TRANSFORMS, expand


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
        ("r4,r3", "sim", False, ("r3", "r4")),
        ("auto", "vllm", False, ("smooth", "r1", "r2")),
        ("auto", "vllm", True, ("smooth", "r2")),
    ],
)
def test_expand(names, target, tied, expected):
    assert expand(names, target, tied=tied) == expected


@pytest.mark.parametrize("name", ["r3", "r4", "online", "learned"])
def test_what_llamacpp_cannot_run_is_refused_with_what_it_can(name):
    with pytest.raises(HalfbyteError, match=rf"gguf cannot run.*expected smooth, r1, r2, got {name}.*--target sim"):
        expand(f"smooth,{name}", "gguf", tied=False)
    assert expand(name, "sim", tied=False) == (name,)


def test_vllm_rotates_at_run_time_on_request():
    for names, expected in [("auto", ("smooth", "r2", "r4")), ("none", ("r4",)), ("r4,smooth", ("smooth", "r4"))]:
        assert expand(names, "vllm", tied=True, online=True) == expected
    with pytest.raises(HalfbyteError, match=r"on request only.*got r4; ask for it with --online_transforms"):
        expand("smooth,r4", "vllm", tied=True)
    for name in ("r3", "online", "learned"):
        with pytest.raises(HalfbyteError, match=f"vllm cannot run this transform.*got {name}"):
            expand(name, "vllm", tied=True, online=True)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(HalfbyteError, match="unknown transform") as stop:
        expand("smooth,rotated", "sim", tied=False)
    assert all(name in str(stop.value) for name in ("auto", "none", "rotate", *TRANSFORMS))
