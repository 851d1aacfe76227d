"""Scales, norms and biases of a W4 plan fitted to the whole model's KL: kept where it loses less; codes stay."""

from __future__ import annotations

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import listening
from halfbyte.plan import codes_path, load_codes, load_plan
from halfbyte.prepare import tune
from halfbyte.prepare.simulation import become_simulation_, load_for_plan
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.targets import TARGETS
from tests.searches import run, same
from tests.test_refine import validation_kl

TUNED = {"spaces": "activations", "calib_tokens": 512, "search_tokens": 512, "tune": 24}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Models of few channels are far from where they end: larger steps, on less text."""
    monkeypatch.setattr(tune, "RATE", 5e-3)
    monkeypatch.setattr(tune, "BATCH_TOKENS", 256)
    monkeypatch.setattr("halfbyte.pipeline.BATCH_TOKENS", 256)


def simulated(path, folder):
    plan = load_plan(path)
    source = load_for_plan(plan, str(folder), device="cpu", dtype="fp32")
    become_simulation_(source, load_codes(codes_path(path)), plan.layers)
    set_activation_bits_(source.model, {name: entry.a_bits for name, entry in plan.layers.items()})
    return plan, source


@pytest.mark.parametrize(
    ("family", "target", "more"),
    [
        ("qwen2", "sim", {}),
        ("llama", "vllm", {"hardware": "hopper"}),
        ("llama", "vllm", {"hardware": "ada"}),
        ("qwen3", "vllm", {"hardware": "blackwell"}),
    ],
)
def test_the_plan_loses_less_and_is_what_was_measured(family, target, more, tiny_folder, tmp_path):
    folder = tiny_folder(family)
    refinement = run(folder, path := tmp_path / "plan.json", target, **TUNED, **more).found["activations"].refinement
    assert refinement.what == "tuned"
    assert refinement.after < 0.99 * refinement.before  # random models have little to say about other text
    plan, source = simulated(path, folder)
    assert validation_kl(source, folder) == pytest.approx(refinement.after, rel=1e-2)
    assert plan.search["validation"]["plan, tuned"] == refinement.after
    run(folder, plain := tmp_path / "plain.json", target, **{**TUNED, "tune": 0}, **more)
    assert validation_kl(simulated(plain, folder)[1], folder) == pytest.approx(refinement.before, rel=1e-2)
    rule = TARGETS.find(target, where="").on(more.get("hardware", "auto"), 1).recipe.scale_rule
    codes, before = load_codes(codes_path(path)), load_codes(codes_path(plain))
    changed = 0
    for name, weight in codes.weights.items():
        assert torch.equal(weight.packed, before.weights[name].packed)
        assert torch.equal(rule.rounded(weight.scales.float()), weight.scales)
        changed += int((weight.scales != before.weights[name].scales).sum())
    assert changed > 0 or target == "vllm"  # whose scales are coarse: small changes are rounded away


def test_a_model_in_bf16_is_tuned(tiny_folder, tmp_path):
    last = said(tiny_folder("qwen2"), tmp_path / "plan.json", dtype="bf16")[-2]
    before, after = (float(part) for part in last.removeprefix("KL on the search text ").split(" -> "))
    assert after < before


def test_gradients_of_scales_are_those_of_the_decoded_weight(tiny_folder, tmp_path):
    """Without rounding of inputs, the gradient is that of finite differences."""
    folder = tiny_folder("qwen2")
    run(folder, path := tmp_path / "plan.json", "sim", **{**TUNED, "tune": 0})
    plan, source = simulated(path, folder)
    set_activation_bits_(source.model, dict.fromkeys(plan.layers, None))
    tuning = tune._Tuning(source, load_codes(codes_path(path)), TARGETS["sim"].recipe.scale_rule)
    name, layer = next(iter(tuning.layers.items()))
    x = torch.randn(2, 5, layer.packed.shape[1], requires_grad=True)
    wanted = torch.randn(2, 5, layer.packed.shape[0])
    (layer(x) * wanted).sum().backward()
    step = 0.05
    known = layer.packed.decode().view(*layer.change.shape, -1)
    moved = torch.zeros_like(known)
    moved[0, 0] = known[0, 0] * step
    with torch.no_grad():
        difference = ((layer.scheme.transform(x) @ moved.flatten(1).T) * wanted).sum() / step
    assert float(layer.change.grad[0, 0]) == pytest.approx(float(difference), rel=1e-3)
    assert name in plan.layers


def said(folder, path, **more) -> list[str]:
    """What a search with tuning reports of it."""
    notes: list[str] = []
    with listening(lambda progress: notes.append(progress.note) if progress.stage == tune.STAGE else None):
        run(folder, path, "sim", **TUNED, **more)
    return notes


def test_best_parameters_stay_what_they_were(tiny_folder, tmp_path):
    folder = tiny_folder("qwen2")
    run(folder, path := tmp_path / "plan.json", "sim", **{**TUNED, "tune": 0})
    tuning = tune._Tuning(simulated(path, folder)[1], load_codes(codes_path(path)), TARGETS["sim"].recipe.scale_rule)
    kept = tuning.codes().parameters
    name = next(name for name in tuning.free if name.endswith("layernorm.weight"))
    before = kept[name].clone()
    with torch.no_grad():
        tuning.free[name].add_(1.0)
    assert torch.equal(kept[name], before)


def test_interrupted_it_ends_in_the_same_plan(tiny_folder, tmp_path):
    folder = tiny_folder("qwen2")
    whole = run(folder, tmp_path / "whole.json", "sim", **TUNED).plan

    def stop(progress) -> None:
        if progress.stage == tune.STAGE and progress.done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listening(stop):
        run(folder, tmp_path / "plan.json", "sim", **TUNED)
    assert same(run(folder, tmp_path / "plan.json", "sim", **TUNED, resume=True).plan, whole)


def test_what_gains_nothing_leaves_the_plan_alone(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "RATE", 0.0)
    folder = tiny_folder("llama")
    assert "nothing was gained" in said(folder, path := tmp_path / "plan.json")[-1]
    assert load_plan(path).search["refinement"] == {}
    run(folder, plain := tmp_path / "plain.json", "sim", **{**TUNED, "tune": 0})
    assert codes_path(path).read_bytes() == codes_path(plain).read_bytes()


def test_values_that_are_not_finite_end_it_with_a_name(tiny_folder, tmp_path, monkeypatch):
    backward, calls = tune._Product.backward, []

    def broken(ctx, *gradients):
        of_x, of_change, none = backward(ctx, *gradients)
        calls.append(ctx.layer)
        return of_x, of_change * (float("nan") if len(calls) > 100 else 1.0), none

    monkeypatch.setattr(tune._Product, "backward", staticmethod(broken))
    notes = [note for note in said(tiny_folder("llama"), tmp_path / "plan.json") if "stopped in step" in note]
    assert [note for note in notes if "proj is not finite" in note]
    assert load_plan(tmp_path / "plan.json").layers


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"tune": -1}, "--tune: out of range"),
        ({"tune": 8, "fitness": "mse"}, "--tune: it fits the W4 codes"),
        ({"tune": 8, "weights_from": "."}, "--tune: does not go with --weights_from"),
    ],
)
def test_what_is_refused(more, match, tiny_folder, tmp_path):
    with pytest.raises(HalfbyteError, match=match):
        run(tiny_folder("llama"), tmp_path / "plan.json", "sim", **more)
