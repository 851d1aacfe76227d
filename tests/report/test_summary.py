"""What the terminal says of results that are made up."""

from __future__ import annotations

from types import SimpleNamespace

from halfbyte.core.stages import Stage
from halfbyte.evaluate.compare import CompareRow, Comparison
from halfbyte.evaluate.quality import Quality
from halfbyte.evaluate.worker import Measured
from halfbyte.plan import LayerPlan, Plan
from halfbyte.report.summary import comparison_summary, search_summary
from halfbyte.search.run import Found, Refinement

PLAN = Plan(
    model_id="m",
    fingerprint="0",
    target="gguf",
    granularity="fused",
    layers={"a": LayerPlan(4, 8, 128), "b": LayerPlan(4, 4, 128)},
    budget_asked=0.8,
    budget_reached=0.75,
    text={"name": "pydoc"},
    tensors={"a": "Q4_K", "b": "Q4_K", "embedding": "Q6_K"},
    file={"sha256": "0"},
)


def found(**changes) -> Found:
    values = {
        "genome": (0, 1),
        "choice": {"a": 8, "b": 4},
        "cost": 1_500_000,
        "budget": 2_000_000,
        "score_label": "KL, nats per token",
        "search_scores": {"all A8": 0.1, "plan": 0.2},
        "validation_scores": {"plan": 0.3},
        "winner": "genetic search",
        "finalists": 5,
        "ties": 2,
        "noise_floor": 0.001,
        "evaluations": 100,
        "history": [],
    }
    return Found(**{**values, **changes})


def said(verbose=False, **menus: Found) -> str:
    outcomes = [SimpleNamespace(note=note) for note in ("", "group 64: 128 does not divide 576") * 2]
    stages = {"load": Stage(1.0), "search": Stage(2.0)}
    result = SimpleNamespace(plan=PLAN, found=menus, outcomes=outcomes, stages=stages, peak_memory=3_000_000)
    return search_summary(result, "my.pt", verbose=verbose)


def test_both_menus_of_a_search():
    short = said(activations=found(), types=found())
    assert short.splitlines() == [
        "activations: 1 layers A4, 1 layers A8, 6.00 bits on average of 6.40 allowed; KL 0.300 on the validation text",
        "file: 1.5 MB of 2.0 MB for 3 matrices, 2 Q4_K, 1 Q6_K; KL 0.300 on the validation text",
        "took 3.00 s, peak memory 3.0 MB",
        "next: halfbyte export --config my.pt",
    ]
    text = said(verbose=True, activations=found(), types=found())
    assert text.count("genetic search; 2 of 5 finalists are ties on the validation text (noise floor 0.001)") == 2
    assert "2 layers: group 64: 128 does not divide 576" in text
    row = next(line for line in text.splitlines() if line.startswith("all A8"))
    assert row.split() == ["all", "A8", "0.100", "—"]


def test_a_refined_winner():
    refinement = Refinement("refined", before=0.3, after=0.2, noise=0.01)
    assert "KL 0.300 on the validation text; refined 0.200" in said(types=found(refinement=refinement))
    assert "refined: KL on the validation text 0.3 -> 0.2 (noise 0.01): kept" in said(
        verbose=True, types=found(refinement=refinement)
    )


def test_a_search_without_validation():
    text = said(verbose=True, activations=found(validation_scores={}))
    assert "validation" not in text
    assert "KL 0.200 on the search text (all A8 0.100)" in text
    assert "matrices" not in text


def test_rows_that_are_there_and_rows_that_are_missing():
    measured = Measured("llama.cpp 1", 100_000_000, 0.5, 200_000_000, [[1]], 10, "logits", 50.0, 25.0, " Halves. ")
    quality = Quality(ppl=8.0, tokens=10, ppl_reference=7.5, kld_mean=0.05, kld_p99=0.5, top1_agreement=0.91)
    mixed = CompareRow("mixed", "m.gguf", "llama.cpp 1", measured, quality, 2.0, note="an old file")
    missing = CompareRow("Q4_K_M", "q.gguf", missing="no file q.gguf")
    comparison = Comparison([missing, mixed], "m", None, "pydoc", 512, 4, "What?", True, "a machine", {})
    assert "Halves" not in comparison_summary(comparison)
    text = comparison_summary(comparison, verbose=True)
    row = next(line for line in text.splitlines() if line.startswith("mixed  "))
    for cell in ("100.0 MB", "500 ms", "50.0", "25.0", "2.00×", "200.0 MB", "8.000", "0.0500", "91.0%"):
        assert cell in row
    assert "Q4_K_M: no file q.gguf" in text
    assert "mixed: an old file" in text
    assert text.endswith("[mixed, llama.cpp 1] Halves.")
    record = comparison.to_dict()["rows"]
    assert record[0]["measured"] is None
    assert record[1]["measured"]["sample"] == " Halves. "
    assert not {"windows", "logits_file"} & set(record[1]["measured"])
