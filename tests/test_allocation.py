"""What a search on KL gives beside the plan: validation, a front, the same plan from packed codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte import cli
from halfbyte.plan import load_plan

QUICK = [
    "--device",
    "cpu",
    "--calib",
    "pydoc",
    "--ctx",
    "64",
    "--calib_tokens",
    "128",
    "--search_tokens",
    "256",
    "--weights",
    "rtn",
    "--ga_pop",
    "6",
    "--ga_gen",
    "5",
]


@pytest.fixture
def search(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(family, *more):
        return cli.run("search", ["--model_id", str(tiny_folder(family)), *QUICK, *more])

    return run


@pytest.mark.parametrize(("family", "target"), [("qwen2", "gguf"), ("llama-tied", "sim")])
def test_packed_codes_give_the_same_plan(family, target, search):
    for codes in ("packed", "decoded"):
        assert search(family, "--target", target, "--codes", codes, "--output", f"{codes}.json") == 0
    packed, decoded = (load_plan(f"{codes}.json") for codes in ("packed", "decoded"))
    assert packed.hash == decoded.hash
    assert packed.search == decoded.search


def test_loss_gradients_from_packed_codes(search):
    for codes in ("packed", "decoded"):
        assert search("qwen2", "--fitness", "fisher", "--codes", codes, "--output", f"{codes}.json") == 0
    packed, decoded = (load_plan(f"{codes}.json") for codes in ("packed", "decoded"))
    assert packed.hash == decoded.hash
    assert packed.search["scores"] == pytest.approx(decoded.search["scores"], rel=1e-4)


def test_other_text_decides(search, capsys):
    assert search("qwen2", "--granularity", "layer", "--output", "plan.json") == 0
    about = load_plan("plan.json").search
    assert (
        about["scores"].keys()
        == about["validation"].keys()
        == {
            "all A8",
            "all A4",
            "rule",
            "knapsack",
            "Fisher knapsack",
            "plan",
        }
    )
    assert about["validation"]["plan"] <= max(about["validation"]["knapsack"], about["validation"]["rule"])
    assert about["validation"] != about["scores"]
    assert 1 <= about["ties"] <= about["finalists"]
    assert about["noise_floor"] > 0
    assert about["valid_tokens"] == about["search_tokens"] == 256
    out = capsys.readouterr().out
    assert "validation text" in out
    assert f"the plan is from: {about['winner']}" in out


def test_a_front(search):
    assert search("llama", "--pareto", "--output", "plan.json") == 0
    front = json.loads(Path("plan.front.json").read_text())["points"]
    assert [point["budget"] for point in front] == [step / 20 for step in range(10, 21)]
    assert all(point["mean_bits"] <= 8 * point["budget"] + 1e-9 for point in front)
    about = load_plan("plan.json").search
    assert front[0]["kl_validation"] == about["validation"]["all A4"]  # no choice at the ends
    assert front[-1]["kl_validation"] == about["validation"]["all A8"]
    assert front[-1]["kl_validation"] < front[5]["kl_validation"] < front[0]["kl_validation"]
    assert set(front[5]["bits"].values()) == {4, 8}
    assert Path("plan.front.csv").read_text().count("\n") == 12
    assert Path("plan.front.png").stat().st_size > 1000


def test_a_front_needs_kl(search, capsys):
    assert search("llama", "--pareto", "--fitness", "mse") == 2
    assert "a front needs the whole model's KL" in capsys.readouterr().err
