from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
from matplotlib import rcParams

from halfbyte.core.errors import HalfbyteError
from halfbyte.report.plots import _distinct, _split_far, convergence_plot, sensitivity_heatmap

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ratios_of(blocks: int) -> list[list[float | None]]:
    rng = np.random.default_rng(0)
    return np.exp(rng.normal(4.5, 0.6, (blocks, len(KINDS)))).tolist()


def history_of(generations: int) -> list[dict[str, float]]:
    best = 0.124 + 0.011 * np.exp(-np.arange(generations) / 6)
    return [
        {"evaluations": 30 + 28 * index, "best": score, "mean": score + 0.01, "std": 0.004}
        for index, score in enumerate(best.tolist())
    ]


def read(path) -> np.ndarray:
    image = matplotlib.image.imread(path)
    assert image.std() > 0.05  # something was drawn
    return image


@pytest.mark.parametrize("blocks", [1, 30])
def test_heatmap_writes_a_picture_and_nothing_else(tmp_path, blocks):
    before = dict(rcParams)
    bits = [[8 if (block + kind) % 2 else 4 for kind in range(len(KINDS))] for block in range(blocks)]
    path = tmp_path / "heat.png"
    sensitivity_heatmap(path, KINDS, range(blocks), ratios_of(blocks), title="$5 a_b", chosen_bits=bits)
    assert read(path).shape[1] > 800
    assert [file.name for file in tmp_path.iterdir()] == ["heat.png"]
    assert dict(rcParams) == before


def test_heatmap_shows_the_choice_and_the_gaps(tmp_path):
    ratios = ratios_of(3)
    sensitivity_heatmap(tmp_path / "plain.png", KINDS, range(3), ratios, title="")
    sensitivity_heatmap(tmp_path / "again.png", KINDS, range(3), ratios, title="")
    sensitivity_heatmap(tmp_path / "bits.png", KINDS, range(3), ratios, title="", chosen_bits=[[8] * 7] * 3)
    ratios[0][0], ratios[1][1], ratios[2][2], ratios[2][3] = None, float("nan"), float("inf"), 0.0
    sensitivity_heatmap(tmp_path / "gaps.png", KINDS, range(3), ratios, title="")
    plain, again, bits, gaps = (read(tmp_path / f"{name}.png") for name in ("plain", "again", "bits", "gaps"))
    assert np.array_equal(plain, again)
    assert not np.array_equal(plain, bits)
    assert not np.array_equal(plain, gaps)


def test_heatmap_of_equal_ratios_and_with_thresholds_on_the_scale(tmp_path):
    sensitivity_heatmap(tmp_path / "a.png", ["o"], [7], [[3.0]], title="", thresholds={})
    sensitivity_heatmap(tmp_path / "b.png", ["o"], [0, 1], [[1.0], [3.0]], title="")
    read(tmp_path / "a.png")
    read(tmp_path / "b.png")


def test_heatmap_refuses_what_it_cannot_draw(tmp_path):
    path = tmp_path / "heat.png"
    for wrong in ([], [[1.0]], [[1.0, 2.0]] * 2):
        with pytest.raises(HalfbyteError, match="shape does not fit"):
            sensitivity_heatmap(path, ["q", "k"], [0], wrong, title="")
    with pytest.raises(HalfbyteError, match="shape does not fit"):
        sensitivity_heatmap(path, ["q", "k"], [0], [[1.0, 2.0]], title="", chosen_bits=[[8]])
    with pytest.raises(HalfbyteError, match="no ratio"):
        sensitivity_heatmap(path, ["q"], [0], [[None]], title="")
    with pytest.raises(HalfbyteError, match="PNG"):
        sensitivity_heatmap(tmp_path / "heat.pdf", ["q"], [0], [[2.0]], title="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "baselines",
    [{}, {"all A8": 0.093, "knapsack": 0.126, "rule": 0.1261}, {"all A8": 0.093, "all A4": 3.85, "random": 0.9}],
)
@pytest.mark.parametrize("generations", [1, 26])
def test_convergence_writes_a_picture(tmp_path, baselines, generations):
    path = tmp_path / "search.png"
    convergence_plot(path, history_of(generations), baselines=baselines, title="search")
    assert read(path).shape[:2] == (840, 1350)
    assert [file.name for file in tmp_path.iterdir()] == ["search.png"]


def test_convergence_of_a_flat_or_negative_score(tmp_path):
    flat = [{"evaluations": 1, "best": 0.0, "mean": 0.0, "std": 0.0}]
    convergence_plot(tmp_path / "flat.png", flat, baselines={"all A8": 0.0}, title="")
    negative = [{**row, "best": -row["best"], "mean": 0.1 - row["best"]} for row in history_of(5)]
    convergence_plot(tmp_path / "negative.png", negative, baselines={"all A4": -0.1}, title="", score_label="−Σ MSE")
    read(tmp_path / "flat.png")
    read(tmp_path / "negative.png")


def test_convergence_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(HalfbyteError, match="no generation"):
        convergence_plot(tmp_path / "a.png", [], baselines={}, title="")
    with pytest.raises(HalfbyteError, match="not finite"):
        convergence_plot(tmp_path / "a.png", history_of(2), baselines={"all A4": float("inf")}, title="")


def test_only_baselines_that_would_squeeze_the_search_are_split_off():
    scores = {"all A4": 1.24, "knapsack": 0.126, "all A8": 0.093}
    near, far = _split_far(scores, 0.124, 0.16)
    assert (set(near), far) == ({"knapsack", "all A8"}, {"all A4": 1.24})
    assert _split_far({"all A4": 0.23}, 0.124, 0.17)[1] == {}
    assert _split_far({"all A4": 0.1}, 0.1, 0.1)[1] == {}


def test_scores_are_told_apart():
    assert _distinct({"a": 0.13504, "b": 0.13501, "c": 3.85, "d": 3.85}) == {
        "a": "0.13504",
        "b": "0.13501",
        "c": "3.85",
        "d": "3.85",
    }
