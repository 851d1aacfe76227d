"""What ``--transforms`` means for each target, what is refused, and that a new transform needs one file."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.modules import linear
from halfbyte.transforms import TRANSFORMS, Transform, expand, in_order


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


def test_each_says_what_it_is():
    assert all(known.about for known in TRANSFORMS.values())
    folded = [name for name in TRANSFORMS if not TRANSFORMS[name].at_run_time]
    assert sorted(folded) == ["r1", "r2", "smooth"]
    assert [known.needs_untied_head for known in in_order(("r2", "r1", "smooth"))] == [False, True, False]


class Reversed(Transform):
    """The channels between up and down in reverse order: the function is the same."""

    about = "a transform of this test"

    def fold_block_(self, block, family, head_dim):
        for part in ("mlp.gate_proj", family.up):
            layer = linear(block, part)
            layer.weight.data = layer.weight.data.flip(0)
        layer = linear(block, family.down)
        layer.weight.data = layer.weight.data.flip(1)


def test_one_from_elsewhere(tiny, transformed):
    """Registered, it can be asked for like the others, and is done with them."""
    TRANSFORMS.register("reversed", Reversed())
    try:
        assert expand("reversed,r2", "gguf", tied=True) == ("r2", "reversed")
        source = copy.deepcopy(tiny("llama"))
        ids = torch.randint(800, (1, 40), generator=torch.Generator().manual_seed(0))
        before, up = source.model(ids).logits, source.model.model.layers[1].mlp.up_proj.weight.clone()
        transformed(source, ids, "r2,reversed")
        assert torch.equal(source.model.model.layers[1].mlp.up_proj.weight, up.flip(0))
        assert float((source.model(ids).logits - before).norm() / before.norm()) < 1e-4
    finally:
        TRANSFORMS.unregister("reversed")
