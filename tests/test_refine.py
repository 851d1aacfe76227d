"""Matrices encoded once more for the mixture that a search chose: kept where it loses less."""

from __future__ import annotations

import pytest
import torch

from halfbyte.calibration.text import cut, load_text
from halfbyte.core.errors import HalfbyteError
from halfbyte.menus import types
from halfbyte.models.loading import find, load
from halfbyte.plan import load_plan, types_path
from halfbyte.prepare.simulation import become_types_, load_for_plan, load_types
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
    assert plan.file["refined"]["kept"] is kept
    assert refinement.before != pytest.approx(refinement.after, rel=1e-3)
    source = load_for_plan(plan, str(folder), device="cpu", dtype="fp32")
    become_types_(source, plan.tensors, load_types(path))
    assert validation_kl(source, folder) == pytest.approx(refinement.after if kept else refinement.before, rel=1e-3)
    plain = run(folder, tmp_path / "plain.json", "gguf", **TYPES, refine=0)
    assert plain.found["types"].refinement is None
    mine, theirs = (types_path(tmp_path / f"{stem}.json").read_bytes() for stem in ("plan", "plain"))
    assert (mine == theirs) is not kept


def test_too_little_memory_keeps_what_the_search_has(tiny_folder, tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(types, "refine_types_", full)
    folder = tiny_folder("qwen2")
    result = run(folder, tmp_path / "plan.json", "gguf", **TYPES)
    assert result.found["types"].refinement is None
    assert same(result.plan, run(folder, tmp_path / "plain.json", "gguf", **TYPES, refine=0).plan)


def test_packed_weights_are_measured_alike(tiny_folder, tmp_path):
    found = [
        run(tiny_folder("qwen2-tied"), tmp_path / f"{codes}.json", "gguf", **TYPES, codes=codes).found["types"]
        for codes in ("packed", "decoded")
    ]
    assert found[0].refinement == found[1].refinement


@pytest.mark.parametrize(("after", "kept"), [(0.8, True), (0.96, False), (1.2, False)])
def test_noise_is_no_reason(after, kept):
    refinement = Refinement(before=1.0, after=after, noise=0.05)
    assert refinement.kept is kept
    assert ("kept" in refinement.said) is kept


@pytest.mark.parametrize(("name", "more"), [("types", {"spaces": "types", "weights": "rtn"}), ("activations", {})])
def test_where_nothing_depends_on_the_choice_nothing_is_made_anew(name, more, tiny_folder, tmp_path):
    target = "gguf" if more else "sim"
    result = run(tiny_folder("llama"), tmp_path / "plan.json", target, transforms="none", **more)
    assert result.found[name].refinement is None


def test_what_is_refused(tiny_folder, tmp_path):
    with pytest.raises(HalfbyteError, match="--refine: expected 0 or 1, got 2"):
        run(tiny_folder("llama"), tmp_path / "plan.json", "sim", refine=2)
