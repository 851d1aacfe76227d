"""Matrices encoded once more for the mixture that a search chose: kept where it loses less."""

from __future__ import annotations

import pytest
import torch

from halfbyte import pipeline
from halfbyte.calibration.text import cut, load_text
from halfbyte.core.errors import HalfbyteError
from halfbyte.menus import types
from halfbyte.models.loading import find, load
from halfbyte.plan import load_plan
from halfbyte.prepare.simulation import become_types_, load_for_plan, load_types, round_inputs_
from halfbyte.search.run import Refinement
from tests.searches import SMALLEST, run, same

CPU = torch.device("cpu")
TYPES = {"spaces": "types", "bpw": 4.6, "transforms": "smooth", "calib_tokens": 2048, "search_tokens": 512}


def verdict(monkeypatch, *, kept: bool) -> None:
    """Whatever is measured."""
    monkeypatch.setattr(Refinement, "kept", property(lambda _: kept))


def validation_kl(source, model_id) -> float:
    """KL of a model on the search's validation text, computed from logits alone."""
    text = load_text(SMALLEST["calib"]).parts["valid"]
    ids = source.tokenizer(text, add_special_tokens=False).input_ids
    ctx = SMALLEST["ctx"]
    tokens = torch.tensor(cut(ids, ctx, TYPES["search_tokens"] // ctx, spread=True, where="valid"))
    original = load(find(str(model_id)), device=CPU, dtype=torch.float32).model
    with torch.no_grad():
        p, q = (model(tokens).logits.log_softmax(-1) for model in (original, source.model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kept", [True, False])
def test_the_plan_has_the_weights_that_were_measured(kept, tiny_folder, tmp_path, monkeypatch):
    verdict(monkeypatch, kept=kept)
    folder, path = tiny_folder("qwen2"), tmp_path / "plan.json"
    refinement = run(folder, path, "gguf", **TYPES).found["types"].refinement
    plan = load_plan(path)
    assert plan.file["refinement"]["kept"] is kept
    assert refinement.before != pytest.approx(refinement.after, rel=1e-3)
    source = load_for_plan(plan, str(folder), device="cpu", dtype="fp32")
    become_types_(source, plan.tensors, load_types(path))
    round_inputs_(source, plan.tensors)
    measured = refinement.after if kept else refinement.before
    assert validation_kl(source, folder) == pytest.approx(measured, rel=1e-3)
    assert plan.file["validation"].get("plan, refined", plan.file["validation"]["plan"]) == measured


def test_without_refining_there_is_gptq_in_the_candidates(tiny_folder, tmp_path):
    folder = tiny_folder("qwen2")
    kl = {}
    for refine in (0, 1):
        found = run(folder, tmp_path / f"{refine}.json", "gguf", **TYPES, refine=refine).found["types"]
        kl[refine] = found.validation_scores["plan"]
    assert kl[0] < 0.9 * kl[1]  # of rounded candidates
    found = run(folder, tmp_path / "limit.json", "gguf", **{**TYPES, "bpw": 0}, max_kl=kl[1]).found["types"]
    assert found.validation_scores["plan"] <= kl[1]  # before refining, too


def test_every_point_of_a_front_is_refined(tiny_folder, tmp_path, monkeypatch):
    verdict(monkeypatch, kept=True)
    folder, path = tiny_folder("qwen2"), tmp_path / "plan.json"
    found = run(folder, path, "gguf", **{**TYPES, "bpw": 0, "ftype": "Q4_K_M"}, pareto=True).found["types"]
    assert found.front["Q4_K_M"].refinement == found.refinement
    assert len({point.refinement.after for point in found.front.values()}) > 1
    for ftype, point in found.front.items():
        beside = path.with_name(f"plan.{ftype}.json")
        source = load_for_plan(plan := load_plan(beside), str(folder), device="cpu", dtype="fp32")
        become_types_(source, plan.tensors, load_types(beside))
        round_inputs_(source, plan.tensors)
        assert validation_kl(source, folder) == pytest.approx(point.refinement.after, rel=1e-2)


def test_weights_that_have_gone_are_made_again(tiny_folder, tmp_path, monkeypatch):
    """As kill -9 leaves it between the move of the weights and the plan."""
    folder, path = tiny_folder("qwen2"), tmp_path / "plan.json"
    whole = run(folder, tmp_path / "whole.json", "gguf", **TYPES).plan

    def full(*_) -> None:
        raise HalfbyteError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_plan", full)
        with pytest.raises(HalfbyteError, match="disk is full"):
            run(folder, path, "gguf", **TYPES)
    (tmp_path / ".plan.json.work" / "types-refined.safetensors").unlink()
    assert same(run(folder, path, "gguf", **TYPES, resume=True).plan, whole)


def test_too_little_memory_keeps_what_the_search_has(tiny_folder, tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(types, "refine_types_", full)
    folder = tiny_folder("qwen2")
    found = run(folder, path := tmp_path / "plan.json", "gguf", **TYPES).found["types"]
    assert found.refinement is None
    source = load_for_plan(plan := load_plan(path), str(folder), device="cpu", dtype="fp32")
    become_types_(source, plan.tensors, load_types(path))
    round_inputs_(source, plan.tensors)
    assert validation_kl(source, folder) == pytest.approx(found.validation_scores["plan"], rel=1e-3)


def test_packed_weights_are_measured_alike(tiny_folder, tmp_path):
    found = [
        run(tiny_folder("qwen2-tied"), tmp_path / f"{codes}.json", "gguf", **TYPES, codes=codes).found["types"]
        for codes in ("packed", "decoded")
    ]
    assert found[0].refinement == found[1].refinement


@pytest.mark.parametrize(("after", "kept"), [(0.96, True), (1.0, False), (1.2, False)])
def test_what_loses_less_is_kept(after, kept):
    refinement = Refinement("refined", before=1.0, after=after, noise=0.05)
    assert refinement.kept is kept
    assert ("kept" in refinement.said) is kept


@pytest.mark.parametrize(("name", "more"), [("types", {"spaces": "types", "weights": "rtn"}), ("activations", {})])
def test_where_nothing_depends_on_the_choice_nothing_is_made_anew(name, more, tiny_folder, tmp_path):
    target = "gguf" if more else "sim"
    result = run(tiny_folder("llama"), tmp_path / "plan.json", target, transforms="none", **more)
    assert result.found[name].refinement is None


def test_what_is_refused(tiny_folder, tmp_path):
    with pytest.raises(HalfbyteError, match="--refine: out of range, expected 0 to 1, got 2"):
        run(tiny_folder("llama"), tmp_path / "plan.json", "sim", refine=2)
