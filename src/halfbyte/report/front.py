"""Pictures of fronts: KL against mean activation bits, and against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from halfbyte.report.plots import DOTS_PER_INCH, LINE_COLOURS, SEARCH_COLOUR, save_figure, set_title


def front_plot(path: str | Path, points: Sequence[Mapping[str, float]], *, title: str, chosen: float) -> None:
    """Write a PNG of the validated KL of each budget's best choice, and of its knapsack.

    Args:
        path: the PNG file, written whole or not at all; an existing one is replaced.
        points: ``mean_bits``, ``kl_validation``, ``kl_knapsack`` and ``noise_floor`` of each budget.
        title: printed above.
        chosen: mean bits of the plan, marked by a line.

    Raises:
        HalfbyteError: the file cannot be written.
    """
    bits = [point["mean_bits"] for point in points]
    _plot(path, bits, points, "mean activation bits, weighted by multiply-accumulates", title, chosen)


def size_front_plot(path: str | Path, points: Sequence[Mapping[str, Any]], *, title: str, chosen: float) -> None:
    """The same against the size of the matrices in a GGUF file.

    Args:
        points: ``bytes`` in place of ``mean_bits``.
        chosen: bytes of the plan.
    """
    sizes = [point["bytes"] / 1e6 for point in points]
    _plot(path, sizes, points, "size of the matrices, MB", title, chosen / 1e6)


def _plot(
    path: str | Path, places: Sequence[float], points: Sequence[Mapping[str, Any]], axis: str, title: str, chosen: float
) -> None:
    figure = Figure(figsize=(6.4, 4.2), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        places,
        [point["kl_knapsack"] for point in points],
        color=LINE_COLOURS[0],
        linestyle="--",
        marker="x",
        label="knapsack over one-at-a-time KL",
    )
    axes.errorbar(
        places,
        [point["kl_validation"] for point in points],
        yerr=[point["noise_floor"] for point in points],
        color=SEARCH_COLOUR,
        marker="o",
        capsize=3,
        label="search; bars: noise floor",
    )
    axes.axvline(chosen, color="#555555", linestyle=":", label="the plan")
    axes.set_xlabel(axis)
    axes.set_ylabel("KL on the validation text, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    set_title(figure, title)
    save_figure(figure, path)
