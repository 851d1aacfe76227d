"""The registry of transforms: a new one needs one file."""

from __future__ import annotations

import copy

import torch

from halfbyte.models.modules import linear
from halfbyte.transforms import TRANSFORMS, Transform, in_order


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
        source = copy.deepcopy(tiny("llama"))
        ids = torch.randint(800, (1, 40), generator=torch.Generator().manual_seed(0))
        before, up = source.model(ids).logits, source.model.model.layers[1].mlp.up_proj.weight.clone()
        transformed(source, ids, "r2,reversed")
        assert torch.equal(source.model.model.layers[1].mlp.up_proj.weight, up.flip(0))
        assert float((source.model(ids).logits - before).norm() / before.norm()) < 1e-4
    finally:
        TRANSFORMS.unregister("reversed")
