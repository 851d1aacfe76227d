"""Pictures of a search: where the model is sensitive, and how the score fell.

Figures are objects of their own; nothing of matplotlib's global state is read for layout or changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from halfbyte.errors import HalfbyteError
from halfbyte.files import whole_file
from halfbyte.report.tables import significant
from halfbyte.search.baselines import RULE_EDGE_THRESHOLD, RULE_THRESHOLD

DOTS_PER_INCH = 150
THRESHOLDS = {"rule": RULE_THRESHOLD, "rule, first and last block": RULE_EDGE_THRESHOLD}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9", "#555555")  # Okabe and Ito, 2008, darkened
MISSING_COLOUR = "#d9d9d9"
OUTLINE = [patheffects.withStroke(linewidth=3.6, foreground="black")]


def sensitivity_heatmap(
    path: str | Path,
    kinds: Sequence[str],
    blocks: Sequence[int],
    ratios: Sequence[Sequence[float | None]],
    *,
    title: str,
    chosen_bits: Sequence[Sequence[int | None]] | None = None,
    thresholds: Mapping[str, float] = THRESHOLDS,
) -> None:
    """Write a PNG of how much more error 4-bit activations make than 8-bit ones, layer by layer.

    Blocks run from left to right, kinds of layers from top to bottom; the colour scale is logarithmic. Values are
    written into the cells when there is room.

    Args:
        path: the PNG file, written whole or not at all; an existing one is replaced.
        kinds: names of the kinds, e.g. ``q_proj``.
        blocks: indices of the transformer blocks.
        ratios: ``[blocks][kinds]`` MSE(A4) / MSE(A8); None, NaN, infinite and non-positive values are drawn as gaps.
        title: printed above.
        chosen_bits: ``[blocks][kinds]`` activation bits of a plan; the largest choice, 8, gets an outline.
        thresholds: name -> ratio, marked on the colour bar, or named below when they are off the scale.

    Raises:
        HalfbyteError: the shapes do not fit, no ratio is usable, or the file cannot be written.
    """
    grid = _grid(ratios, len(blocks), len(kinds), "ratios")  # [kinds, blocks]
    grid[~(np.isfinite(grid) & (grid > 0))] = np.nan
    if np.isnan(grid).all():
        raise HalfbyteError("no ratio to draw", where="sensitivity heatmap", expected="a positive number")
    chosen = None if chosen_bits is None else _grid(chosen_bits, len(blocks), len(kinds), "chosen_bits")
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    norm = LogNorm(low, high) if high > low * 1.01 else LogNorm(low / 1.5, high * 1.5)
    colours = colormaps["viridis"]

    cell_width = min(max(12.5 / len(blocks), 0.15), 0.6)  # inches
    size = (max(cell_width * len(blocks) + 2.6, 6.5), max(0.42 * len(kinds) + 1.9, 3.2))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(MISSING_COLOUR)
    axes.imshow(np.ma.masked_invalid(grid), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=11, wrap=True)
    axes.set_xlabel("transformer block")
    every = math.ceil(0.26 / cell_width)
    axes.set_xticks(range(0, len(blocks), every), [str(block) for block in blocks[::every]], fontsize=8)
    axes.set_yticks(range(len(kinds)), list(kinds), fontsize=9)
    axes.set_xticks(np.arange(1, len(blocks)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(kinds)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)

    if cell_width >= 0.3:
        for (kind, block), ratio in np.ndenumerate(grid):
            if not np.isnan(ratio):
                red, green, blue, _ = colours(float(norm(ratio)))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5  # luma, ITU-R BT.601
                text = f"{ratio:.0f}" if ratio >= 10 else significant(float(ratio), 2)
                axes.text(block, kind, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    handles: list[Patch | Line2D] = []
    if chosen is not None:
        for kind, block in np.argwhere(chosen == 8):
            axes.add_patch(_outline((block - 0.42, kind - 0.42), 0.84, 0.84))
        handles.append(
            Patch(facecolor="none", edgecolor="white", linewidth=1.6, path_effects=OUTLINE, label="A8 chosen")
        )
        handles.append(Patch(facecolor="#9a9a9a", label="no outline: A4 chosen"))
    if np.isnan(grid).any():
        handles.append(Patch(facecolor=MISSING_COLOUR, label="no value"))

    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.01, aspect=18)
    bar.set_label("MSE of A4 / MSE of A8\n(error of 4 bits, in errors of 8 bits)", fontsize=9)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    for name, threshold in thresholds.items():
        if low <= threshold <= high:
            bar.ax.axhline(threshold, color="white", linewidth=2, path_effects=OUTLINE)
            handles.append(
                Line2D([], [], color="white", linewidth=2, path_effects=OUTLINE, label=f"{name}: {threshold:g}×")
            )
        else:
            side = "above" if threshold < low else "below"
            handles.append(Line2D([], [], linestyle="none", label=f"{name}: {threshold:g}× (every layer is {side})"))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8)
    _save(figure, path)


def convergence_plot(
    path: str | Path,
    history: Sequence[Mapping[str, float]],
    *,
    baselines: Mapping[str, float],
    title: str,
    score_label: str = "KL(reference ‖ quantised), nats per token",
) -> None:
    """Write a PNG of best and mean score against evaluations, with baselines as horizontal lines.

    Baselines far above everything else (all A4) get a strip of their own above a break in the axis.

    Args:
        path: the PNG file, written whole or not at all; an existing one is replaced.
        history: rows with ``evaluations``, ``best``, ``mean`` and ``std``, one per generation.
        baselines: name -> score on the same text.
        title: printed above.
        score_label: what the score is, with its unit.

    Raises:
        HalfbyteError: the history is empty, a number is not finite, or the file cannot be written.
    """
    if not history:
        raise HalfbyteError("no generation to draw", where="convergence plot")
    evaluations, best, mean, std = (
        np.array([row[key] for row in history], dtype=float) for key in ("evaluations", "best", "mean", "std")
    )
    if not np.isfinite([*best, *mean, *std, *baselines.values()]).all():
        raise HalfbyteError("a score is not finite", where="convergence plot")
    near, far = _split_far(dict(baselines), float(best.min()), float((mean + std).max()))

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    figure.get_layout_engine().set(hspace=0.03)  # type: ignore[union-attr]
    if far:
        strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=[0.8, 5])
        _mark_break(strip, axes)
        values = list(far.values())
        margin = max(0.6 * (max(values) - min(values)), 0.1 * abs(max(values)))
        strip.set_ylim(min(values) - margin, max(values) + margin)
        strip.yaxis.set_major_locator(MaxNLocator(2))
    else:
        axes = figure.subplots()
        strip = axes
    strip.set_title(title, loc="left", fontsize=11, wrap=True)
    only = "o" if len(history) == 1 else None
    axes.fill_between(evaluations, mean - std, mean + std, color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.plot(
        evaluations,
        mean,
        color=COLOURS[0],
        linewidth=1.2,
        marker=only,
        label="mean of the population ± 1 standard deviation",
    )
    axes.plot(evaluations, best, color="black", linewidth=2, marker=only, drawstyle="steps-post", label="best so far")
    axes.set_xlabel("genomes evaluated")
    axes.set_ylabel(score_label)
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    ends = [*near.values(), best.min(), best.max(), (mean - std).min(), (mean + std).max()]
    margin = 0.06 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    colours = {name: COLOURS[1 + index % (len(COLOURS) - 1)] for index, name in enumerate(baselines)}
    for panel, lines in ((axes, near), (strip, far)):
        for name, value in lines.items():
            panel.axhline(value, color=colours[name], linewidth=1.2, linestyle=(0, (5, 2)))
        labels = {f"{name} {significant(value)}": (value, colours[name]) for name, value in lines.items()}
        if panel is axes:
            labels[f"search {significant(float(best[-1]))}"] = (float(best[-1]), "black")
        _label_right(figure, panel, labels)
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
    _save(figure, path)


def _grid(values: Sequence[Sequence[float | None]], blocks: int, kinds: int, name: str) -> np.ndarray:
    """``[blocks][kinds]`` with gaps -> ``[kinds, blocks]`` with NaN."""
    if len(values) != blocks or any(len(row) != kinds for row in values) or not blocks or not kinds:
        raise HalfbyteError("shape does not fit", where=name, expected=f"{blocks} blocks of {kinds} kinds")
    return np.array([[math.nan if value is None else value for value in row] for row in values], dtype=float).T


def _outline(corner: tuple[float, float], width: float, height: float) -> Rectangle:
    return Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.6, path_effects=OUTLINE)


def _split_far(baselines: dict[str, float], low: float, high: float) -> tuple[dict[str, float], dict[str, float]]:
    """Baselines that share an axis with ``low``…``high``, and those above by more than its whole height."""
    near: dict[str, float] = {}
    for name, value in sorted(baselines.items(), key=lambda item: item[1]):
        if value > high + 1.5 * (high - min(low, value)) and near.keys() != baselines.keys():
            break
        near[name] = value
        low, high = min(low, value), max(high, value)
    return near, {name: value for name, value in baselines.items() if name not in near}


def _mark_break(strip: Axes, axes: Axes) -> None:
    """Two slanted strokes where the axis jumps."""
    strip.spines.bottom.set_visible(False)
    axes.spines.top.set_visible(False)
    strip.tick_params(bottom=False)
    stroke = {
        "marker": [(-1, -0.6), (1, 0.6)],
        "markersize": 9,
        "linestyle": "none",
        "color": "black",
        "clip_on": False,
    }
    strip.plot([0, 1], [0, 0], transform=strip.transAxes, **stroke)
    axes.plot([0, 1], [1, 1], transform=axes.transAxes, **stroke)


def _label_right(figure: Figure, axes: Axes, labels: Mapping[str, tuple[float, str]]) -> None:
    """Names to the right of the axes at their heights, moved apart where they would overlap."""
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / figure.dpi * 72  # points
    step = 11 / height * (high - low)
    placed: list[tuple[str, float, float, str]] = []
    for label, (value, colour) in sorted(labels.items(), key=lambda item: item[1][0]):
        position = max(value, placed[-1][1] + step) if placed else value
        placed.append((label, position, value, colour))
    ceiling = high
    for label, position, value, colour in reversed(placed):
        position = min(position, ceiling)
        ceiling = position - step
        axes.annotate(
            label,
            xy=(1, value),
            xytext=(1.025, position),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )


def _save(figure: Figure, path: str | Path) -> None:
    if Path(path).suffix.lower() != ".png":
        raise HalfbyteError("plots are PNG files", where=path, fix="choose a name that ends in .png")
    FigureCanvasAgg(figure)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=DOTS_PER_INCH)
