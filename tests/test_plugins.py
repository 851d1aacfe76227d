"""What is added from outside the package is searched with like what came with it: no other file changes."""

from __future__ import annotations

import pytest
import torch

import halfbyte
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.modules import linear
from halfbyte.plan import load_codes, load_plan
from halfbyte.prepare.recipe import Recipe
from halfbyte.quant.quantisers import QUANTISERS, WeightQuantiser
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.targets import TARGETS, Target
from halfbyte.transforms import TRANSFORMS, Transform
from tests.searches import run


class Toaster(Target):
    """Hardware that nobody has: symmetric activation codes, and a transform of its own by default."""

    name = "toaster"
    recipe = Recipe(symmetric=True, clip=False)
    best = "none"

    def check_model(self, source, layers, options, group_sizes) -> None:
        if len(layers) > 100:
            raise HalfbyteError(f"{layers[100].name}: a toaster has no room for it", fix="use a larger toaster")

    def export(self, options):
        return f"toast of {load_plan(options.config).hash} in {options.output}"


def halves(moments, group_size, where, rule):
    """Rounding of a weight that is first halved, to be seen in the scales."""
    return round_to_nearest(moments.weight / 2, group_size, rule=rule, where=where), "halved"


@pytest.fixture
def registered():
    """Registers things, and takes them out again."""
    added = []

    def register(registry, name, thing):
        registry.register(name, thing)
        added.append((registry, name))

    yield register
    for registry, name in added:
        registry.unregister(name)
        assert name not in registry


def test_a_target_and_a_quantiser_from_outside(registered, tiny_folder, tmp_path):
    with pytest.raises(HalfbyteError, match="--target: unknown value, expected one of gguf, sim, vllm"):
        run(tiny_folder("llama"), tmp_path / "plan.json", "toaster")
    registered(TARGETS, "toaster", Toaster())
    registered(QUANTISERS, "halves", WeightQuantiser(halves, looks_at_inputs=False, rounding_share=1.0))
    run(tiny_folder("llama"), tmp_path / "plan.json", "toaster", weights="halves")
    run(tiny_folder("llama"), tmp_path / "rtn.json", "toaster", weights="rtn")
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.target, plan.weights, plan.transforms) == ("toaster", "halves", ())
    assert all(entry.a_symmetric and "halved" in entry.note for entry in plan.layers.values())
    ours, theirs = (load_codes(tmp_path / f"{name}.safetensors").weights for name in ("plan", "rtn"))
    for name, weight in ours.items():
        assert torch.equal(weight.packed, theirs[name].packed)
        assert torch.allclose(2 * weight.scales.float(), theirs[name].scales.float(), rtol=2e-3)
    assert halfbyte.export(tmp_path / "plan.json", "out") == f"toast of {plan.hash} in out"


def test_a_target_refuses_before_any_work(registered, tiny_folder, tmp_path, monkeypatch):
    class Small(Toaster):
        name = "small"
        runs_online = frozenset()

        def check_options(self, options) -> None:
            super().check_options(options)
            if options.granularity == "layer":
                raise HalfbyteError("--granularity: a toaster has two slots")

    registered(TARGETS, "small", Small())
    for more, match in (({"granularity": "layer"}, "two slots"), ({"transforms": "online"}, "small cannot run")):
        with pytest.raises(HalfbyteError, match=match):
            run(tiny_folder("llama"), tmp_path / "plan.json", "small", **more)
    assert not list(tmp_path.iterdir())


def test_a_transform_from_outside(registered, tiny_folder, tmp_path):
    """It turns two channels between up and down around; codes follow, answers do not."""

    class Swap(Transform):
        order = 1

        def fold_block_(self, block, family, head_dim) -> None:
            up, gate, down = (linear(block, part) for part in (family.up, "mlp.gate_proj", family.down))
            order = torch.arange(up.out_features)
            order[:2] = torch.tensor([1, 0])
            with torch.no_grad():
                for layer in (up, gate):
                    layer.weight.copy_(layer.weight[order])
                down.weight.copy_(down.weight[:, order])

    registered(TRANSFORMS, "swap", Swap())
    registered(TARGETS, "toaster", Toaster())
    made = {"weights": "rtn", "group_size": 64}
    swapped = run(tiny_folder("llama"), tmp_path / "swap.json", "toaster", transforms="swap", **made)
    plain = run(tiny_folder("llama"), tmp_path / "plain.json", "toaster", transforms="none", **made)
    assert load_plan(tmp_path / "swap.json").transforms == ("swap",)
    ours, theirs = (load_codes(tmp_path / f"{name}.safetensors").weights for name in ("swap", "plain"))
    name = "model.layers.1.mlp.up_proj"
    order = [1, 0, *range(2, len(ours[name].packed))]
    assert torch.equal(ours[name].packed, theirs[name].packed[order])
    losses = [result.found["activations"].search_scores["all A8"] for result in (swapped, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # both channels share a group of down_proj
