"""The registry of transforms: a new one needs one file."""

from __future__ import annotations

import copy

import torch

from halfbyte.core.registry import Registry
from halfbyte.models.modules import linear
from halfbyte.transforms import TRANSFORMS, Transform, in_order


def test_what_is_folded_and_what_needs_a_head_of_its_own():
    folded = [name for name in TRANSFORMS if not TRANSFORMS[name].at_run_time]
    assert sorted(folded) == ["r1", "r2", "smooth"]
    assert [known.needs_untied_head for known in in_order(("r2", "r1", "smooth"))] == [False, True, False]


def test_a_hyphen_is_as_good_as_an_underscore():
    known: Registry[int] = Registry("engine", "halfbyte.engines", "ENGINE")
    known.register("my_engine", 1)
    known.register("llama-cpp-python", 2)
    assert [known[name] for name in ("my_engine", "my-engine", "llama_cpp_python")] == [1, 1, 2]
    assert known.names().count("llama-cpp-python") == 1
    known.unregister("my-engine")
    assert "my_engine" not in known


class Reversed(Transform):
    """The channels between up and down in reverse order: the function is the same."""

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
        source = copy.deepcopy(tiny("llama"))
        ids = torch.randint(800, (1, 40), generator=torch.Generator().manual_seed(0))
        before, up = source.model(ids).logits, source.model.model.layers[1].mlp.up_proj.weight.clone()
        transformed(source, ids, "r2,reversed")
        assert torch.equal(source.model.model.layers[1].mlp.up_proj.weight, up.flip(0))
        assert float((source.model(ids).logits - before).norm() / before.norm()) < 1e-4
    finally:
        TRANSFORMS.unregister("reversed")
