"""Whole searches as a library call, on tiny models."""

from __future__ import annotations

import pytest

from halfbyte.options import SearchOptions
from halfbyte.pipeline import search
from halfbyte.plan import load_plan


def options(folder, tmp_path, target, **further):
    usual = {"calib": "pydoc", "ctx": 64, "calib_tokens": 512, "search_tokens": 256, "ga_pop": 6, "ga_gen": 2}
    output = str(tmp_path / "plan.json")
    return SearchOptions(model_id=str(folder), output=output, target=target, device="cpu", **{**usual, **further})


@pytest.mark.parametrize("target", ["sim", "gguf", "vllm"])
def test_every_target_gets_a_plan(tiny_folder, tmp_path, target):
    result = search(options(tiny_folder("qwen2"), tmp_path, target))
    plan = load_plan(tmp_path / "plan.json")
    assert plan.hash == result.plan.hash
    assert {entry.w_bits for entry in plan.layers.values()} == {4}
    assert {entry.a_bits for entry in plan.layers.values()} == {4, 8}
    assert plan.budget_reached <= 0.75
    assert list(result.found) == (["activations", "types"] if target == "gguf" else ["activations"])
    assert all(path.exists() for path in result.files)
    scores = result.found["activations"].validation_scores
    assert scores["all A8"] < scores["plan"] < scores["all A4"]
    assert not (tmp_path / ".plan.json.work").exists()


@pytest.mark.parametrize("fitness", ["mse", "fisher"])
def test_layer_errors_as_the_score(tiny_folder, tmp_path, fitness):
    found = search(options(tiny_folder("llama"), tmp_path, "sim", fitness=fitness)).found["activations"]
    assert found.search_scores["plan"] <= min(found.search_scores[label] for label in ("rule", "KL knapsack"))
    assert not found.validation_scores


def test_fronts_of_both_menus(tiny_folder, tmp_path):
    result = search(options(tiny_folder("llama"), tmp_path, "gguf", pareto=True, ga_gen=1))
    costs = [point.cost for point in result.found["activations"].front.values()]
    assert costs == sorted(costs)
    sizes = {ftype: point.cost for ftype, point in result.found["types"].front.items()}
    assert sizes["Q4_K_M"] == result.found["types"].cost
    for ftype, size in sizes.items():
        assert load_plan(tmp_path / f"plan.{ftype}.json").file["nbytes"] == size
