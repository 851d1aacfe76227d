"""The functions that the commands call, for scripts and notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import halfbyte

EMPTY_PLAN = {
    "model_id": "m",
    "fingerprint": "0",
    "target": "gguf",
    "granularity": "fused",
    "layers": {},
    "budget_asked": 1.0,
    "budget_reached": 1.0,
    "version": 2,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_library_does_what_the_commands_do(tiny_folder, here):
    """The calls of the README, on a tiny model."""
    folder = tiny_folder("llama")
    quick = {"device": "cpu", "calib": "pydoc", "ctx": 64, "calib_tokens": 128, "search_tokens": 128}
    quantised = halfbyte.quantize(folder, output="plan.json", spaces="types", ga_pop=6, ga_gen=3, **quick)
    assert quantised.path == Path("plan.json")
    assert quantised.plan.hash == quantised.search.plan.hash == halfbyte.load_plan("plan.json").plan.hash
    written = quantised.export("m.gguf")
    assert written.path == Path("m.gguf")
    assert written.kl < 0.05
    score = {"text": "pydoc", "ctx": 64, "chunks": 2}
    in_file = halfbyte.evaluate(folder, gguf="m.gguf", **score)
    simulated = halfbyte.evaluate(folder, plan=quantised, **score)
    assert in_file.quality.kld_mean == pytest.approx(simulated.quality.kld_mean, rel=0.3)
    assert in_file.tokenizers_agree
    rows = {row.name: row for row in quantised.simulate(max_tokens=4, **score).rows}
    assert rows["GGUF types"].quality.kld_mean == pytest.approx(simulated.quality.kld_mean, rel=1e-3)
    comparison = quantised.compare(mixed_path="m.gguf", skip_original=True, max_tokens=4, **score)
    assert {row.name: bool(row.measured) for row in comparison.rows} == {"Q4_K_M": False, "mixed": True}


def test_the_example_of_the_readme_runs(tiny_folder, here, monkeypatch):
    """As it stands there, but on a tiny model and with little text."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    folder, score = str(tiny_folder("llama")), {"text": "pydoc", "ctx": 64, "chunks": 2}
    little = {
        "quantize": {"device": "cpu", "calib": "pydoc", "ctx": 64, "calib_tokens": 128, "search_tokens": 128},
        "evaluate": score,
        "compare": {"skip_original": True, "max_tokens": 4, **score},
    }
    little["quantize"] |= {"ga_pop": 4, "ga_gen": 1, "weights": "rtn", "transforms": "smooth"}
    called = []

    def quick(name, function):
        def call(*given, **options):
            called.append(name)
            return function(*(folder if value == "demo" else value for value in given), **{**little[name], **options})

        return call

    for name in little:
        monkeypatch.setattr(halfbyte, name, quick(name, getattr(halfbyte, name)))
    exec(compile(example, "README.md", "exec"), {})
    assert called == ["quantize", "evaluate", "compare"]
    assert Path("models/demo.gguf").exists()


def test_the_library_refuses_what_it_does_not_know(here):
    with pytest.raises(halfbyte.HalfbyteError, match=r"quantize: unknown option bits, expected one of .*group_size"):
        halfbyte.quantize("demo", bits=4)
    with pytest.raises(halfbyte.HalfbyteError, match=r"--target: unknown value, expected one of .*sim.*, got cpu"):
        halfbyte.quantize("demo", target="cpu")
    Path("plan.json").write_text(json.dumps(EMPTY_PLAN))
    with pytest.raises(halfbyte.HalfbyteError, match="export: unknown option json"):
        halfbyte.export("plan.json", "m.gguf", json="x.json")
    with pytest.raises(halfbyte.HalfbyteError, match="no such plan"):
        halfbyte.load_plan("missing.json")


def test_an_option_of_another_type_is_refused():
    with pytest.raises(halfbyte.HalfbyteError, match="quantize: size is of another type, expected str, got int 4000"):
        halfbyte.quantize("demo", size=4000)
    with pytest.raises(halfbyte.HalfbyteError, match="quantize: ga_pop is of another type, expected int, got str '4'"):
        halfbyte.quantize("demo", ga_pop="4")
