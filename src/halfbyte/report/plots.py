"""Pictures of a search: where the model is sensitive, and how the score fell.

Figures are objects of their own (no pyplot), so nothing global is changed and no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import whole_file
from halfbyte.core.language import say
from halfbyte.report.tables import significant
from halfbyte.search.sensitivity import RULE_EDGE_THRESHOLD, RULE_THRESHOLD

DOTS_PER_INCH = 150
COLOUR_MAP = "viridis"  # perceptually uniform, and readable without telling red from green
MISSING_COLOUR = "#d9d9d9"
GRID_COLOUR = "#e3e3e3"
INK = "#0a0a0a"  # on a light cell; black follows the page that a picture stands on
SEARCH_COLOUR = "#0072b2"
LINE_COLOURS = ("#d55e00", "#00805c", "#b5558a", "#8c6d1f", "#6a3d9a", "#555555")  # after Okabe and Ito, 2008, darker


def sensitivity_heatmap(
    path: str | Path,
    kinds: Sequence[str],
    blocks: Sequence[int],
    ratios: Sequence[Sequence[float | None]],
    *,
    title: str,
    chosen_bits: Sequence[Sequence[int | None]] | None = None,
    thresholds: Mapping[str, float] | None = None,
    widths: tuple[int, int] = (4, 8),
) -> None:
    """Write a PNG of how much more error the fewest activation bits make than the most, layer by layer.

    Blocks run from top to bottom, kinds of layers from left to right; the colour scale is logarithmic. Values are
    written into the cells when there is room.

    Args:
        path: the PNG file, written whole or not at all; an existing one is replaced.
        kinds: names of the kinds, e.g. ``q_proj``.
        blocks: indices of the transformer blocks.
        ratios: ``[blocks][kinds]`` MSE with the fewest bits / MSE with the most; None, NaN, infinite and non-positive
            values are drawn as gaps.
        title: printed above.
        chosen_bits: ``[blocks][kinds]`` activation bits of a plan; layers with the most get an outline.
        thresholds: name -> ratio, by default those of the rule; marked on the colour bar, or named below when they are
            off the scale.
        widths: the fewest and the most activation bits.

    Raises:
        HalfbyteError: the shapes do not fit, no ratio is usable, or the file cannot be written.
    """
    grid = _grid(ratios, len(blocks), len(kinds), "ratios")
    grid[~(np.isfinite(grid) & (grid > 0))] = np.nan
    if np.isnan(grid).all():
        raise HalfbyteError("sensitivity heatmap: no ratio to draw, expected a positive number")
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    norm = LogNorm(low, high) if high > low * 1.01 else LogNorm(low / 1.5, high * 1.5)

    row_height = min(max(12.0 / len(blocks), 0.13), 0.25)  # inches
    size = max(0.78 * len(kinds) + 1.9, 5.6), max(row_height * len(blocks) + 1.9, 3.6)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(MISSING_COLOUR)
    axes.imshow(np.ma.masked_invalid(grid), cmap=COLOUR_MAP, norm=norm, aspect="auto", interpolation="nearest")
    _dress_grid(axes, kinds, blocks, every=math.ceil(0.16 / row_height))
    set_title(figure, title)
    if row_height >= 0.2:
        _write_values(axes, grid, norm)

    handles: list[Patch | Line2D] = []
    if chosen_bits is not None:
        width = 5.6 * row_height  # points
        stroke = withStroke(linewidth=2.3 * width, foreground=INK)
        outline: dict[str, Any] = {"edgecolor": "white", "linewidth": width, "path_effects": [stroke]}
        for block, kind in np.argwhere(_grid(chosen_bits, len(blocks), len(kinds), "chosen_bits") == widths[1]):
            axes.add_patch(Rectangle((kind - 0.45, block - 0.39), 0.9, 0.78, fill=False, **outline))
        middle = colormaps[COLOUR_MAP](0.5)
        handles.append(Patch(facecolor=middle, label=say("A{bits} chosen", bits=widths[1]), **outline))
        handles.append(Patch(facecolor=middle, label=say("A{bits} chosen", bits=widths[0])))
    if np.isnan(grid).any():
        handles.append(Patch(facecolor=MISSING_COLOUR, label=say("no value")))
    label = say("MSE of A{low} / MSE of A{high} (log scale)", low=widths[0], high=widths[1])
    if thresholds is None:
        edges = say("rule threshold, first and last block")
        thresholds = {say("rule threshold"): RULE_THRESHOLD, edges: RULE_EDGE_THRESHOLD}
    handles += _add_colour_bar(figure, axes, norm, thresholds, (low, high), label)
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    save_figure(figure, path)


def convergence_plot(
    path: str | Path,
    history: Sequence[Mapping[str, float]],
    *,
    baselines: Mapping[str, float],
    title: str,
    score_label: str = "KL(reference ‖ quantised), nats per token",
    noise: float = 0.0,
) -> None:
    """Write a PNG of best and mean score against evaluations, with baselines as horizontal lines.

    Baselines far above everything else (all A4) get a strip of their own above a break in the axis.

    Args:
        path: the PNG file, written whole or not at all; an existing one is replaced.
        history: rows with ``evaluations``, ``best``, ``mean`` and ``std``, one per generation.
        baselines: name -> score on the same text.
        title: printed above.
        score_label: what the score is, with its unit.
        noise: standard error of a difference between two choices; a band around the last score.

    Raises:
        HalfbyteError: the history is empty, a number is not finite, or the file cannot be written.
    """
    if not history:
        raise HalfbyteError("convergence plot: no generation to draw")
    columns = ("evaluations", "best", "mean", "std")
    evaluations, best, mean, std = (np.array([row[key] for row in history], dtype=float) for key in columns)
    if not np.isfinite([*best, *mean, *std, *baselines.values()]).all():
        raise HalfbyteError("convergence plot: a score is not finite")
    lowest, highest = min(best.min(), (mean - std).min()), max(best.max(), (mean + std).max())
    near, far = _split_far(baselines, float(lowest), float(highest))

    figure = Figure(figsize=(9, 5.6), dpi=DOTS_PER_INCH, layout="constrained")
    axes, strip = _axes_with_strip(figure, list(far.values()))
    set_title(figure, title)
    marker = "o" if len(history) == 1 else None
    axes.plot(
        evaluations, best, color="black", linewidth=2, marker=marker, drawstyle="steps-post", label=say("best so far")
    )
    axes.plot(evaluations, mean, color=SEARCH_COLOUR, linewidth=1.2, marker=marker, label=say("mean of the population"))
    if len(history) > 1:
        band: dict[str, Any] = {
            "color": SEARCH_COLOUR,
            "alpha": 0.15,
            "linewidth": 0,
            "label": say("± 1 standard deviation"),
        }
        axes.fill_between(evaluations, mean - std, mean + std, **band)
    if noise:
        floor: dict[str, Any] = {"color": GRID_COLOUR, "linewidth": 0, "zorder": 0, "label": say("± noise floor")}
        axes.axhspan(float(best[-1]) - noise, float(best[-1]) + noise, **floor)
    axes.set_xlabel(say("genomes evaluated"))
    axes.set_ylabel(score_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)
    axes.grid(axis="y", color=GRID_COLOUR)
    axes.set_axisbelow(True)
    ends = [*near.values(), lowest, highest]
    margin = 0.06 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    axes.set_ylim(min(ends) - margin, max(ends) + margin)

    colours = {name: LINE_COLOURS[index % len(LINE_COLOURS)] for index, name in enumerate(baselines)}
    for panel, lines in ((axes, near), (strip, far)):
        for name, value in lines.items():
            panel.axhline(value, color=colours[name], linewidth=1.2, linestyle=(0, (5, 2)))
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
    figure.draw_without_rendering()  # so that heights are known
    search = say("search")
    scores = {**baselines, search: float(best[-1])}
    texts = _distinct(scores)
    for panel, names in ((axes, [*near, search]), (strip, [*far])):
        _label_right(panel, {f"{name}: {texts[name]}": (scores[name], colours.get(name, "black")) for name in names})
    save_figure(figure, path)


def _grid(values: Sequence[Sequence[float | None]], blocks: int, kinds: int, name: str) -> np.ndarray:
    """``[blocks, kinds]`` as an array, gaps as NaN."""
    if len(values) != blocks or any(len(row) != kinds for row in values) or not blocks or not kinds:
        raise HalfbyteError(f"{name}: shape does not fit, expected {blocks} blocks of {kinds} kinds")
    return np.array([[math.nan if value is None else value for value in row] for row in values], dtype=float)


def _dress_grid(axes: Axes, kinds: Sequence[str], blocks: Sequence[int], every: int) -> None:
    """Names of kinds and blocks, thin white lines between cells, no frame."""
    axes.set_ylabel(say("transformer block"))
    axes.set_yticks(range(0, len(blocks), every), [str(block) for block in blocks[::every]], fontsize=8)
    axes.set_xticks(range(len(kinds)), list(kinds), fontsize=9)
    axes.tick_params(which="both", length=0, bottom=False, labeltop=True, labelbottom=False)
    axes.set_yticks(np.arange(1, len(blocks)) - 0.5, minor=True)
    axes.set_xticks(np.arange(1, len(kinds)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.spines[:].set_visible(False)


def _write_values(axes: Axes, grid: np.ndarray, norm: LogNorm) -> None:
    """The ratio in each cell of ``[blocks, kinds]``, white on dark colours and black on light ones."""
    for (block, kind), ratio in np.ndenumerate(grid):
        if np.isnan(ratio):
            continue
        dark = needs_white(colormaps[COLOUR_MAP](float(norm(ratio))))
        text = f"{ratio:.0f}" if ratio >= 9.95 else significant(float(ratio), 2)
        axes.text(kind, block, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)


def needs_white(colour: Sequence[float]) -> bool:
    """Whether white letters have more contrast on an sRGB ``colour`` (0 to 1 each) than black ones (WCAG 2.1)."""
    red, green, blue = (channel**2.2 for channel in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179


def _add_colour_bar(
    figure: Figure, axes: Axes, norm: LogNorm, thresholds: Mapping[str, float], ends: tuple[float, float], label: str
) -> list[Line2D]:
    """A colour bar with the thresholds on it; returns their legend entries, also of those that are off the scale."""
    bar = figure.colorbar(ScalarMappable(norm, COLOUR_MAP), ax=axes, pad=0.02, aspect=30)
    bar.set_label(label, fontsize=9)
    low, high = ends
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(labelsize=8)
    styles: list[Any] = ["-", ":"]
    entries: list[Line2D] = []
    for (name, threshold), style in zip(thresholds.items(), cycle(styles), strict=False):
        label = f"{name}: {threshold:g}×"
        if low <= threshold <= high:
            bar.ax.axhline(threshold, color="white", linewidth=4)
            bar.ax.axhline(threshold, color=INK, linewidth=2, linestyle=style)
            entries.append(Line2D([], [], color="black", linewidth=2, linestyle=style, label=label))
        else:
            side = say("every layer is above" if threshold < low else "every layer is below")
            entries.append(Line2D([], [], linestyle="none", label=f"{label} ({side})"))
    return entries


def _split_far(baselines: Mapping[str, float], low: float, high: float) -> tuple[dict[str, float], dict[str, float]]:
    """Baselines that share an axis with ``low``…``high``, and those that would squeeze it to less than two fifths."""
    near: dict[str, float] = {}
    for name, value in sorted(baselines.items(), key=lambda item: item[1]):
        if value > high + 1.5 * max(high - low, 0.02 * abs(high)):
            break
        near[name] = value
        low, high = min(low, value), max(high, value)
    return near, {name: value for name, value in baselines.items() if name not in near}


def _axes_with_strip(figure: Figure, far: list[float]) -> tuple[Axes, Axes]:
    """The main axes and, where there are ``far`` scores, a strip for them above a break; else the same axes twice."""
    if not far:
        axes = figure.add_subplot()
        return axes, axes
    grid = figure.add_gridspec(2, 1, height_ratios=[0.5 + 0.3 * len(far), 5], hspace=0.03)
    axes = figure.add_subplot(grid[1])
    strip = figure.add_subplot(grid[0], sharex=axes)
    margin = max(0.4 * (max(far) - min(far)), 0.1 * abs(max(far)))
    strip.set_ylim(min(far) - margin, max(far) + margin)
    strip.yaxis.set_major_locator(MaxNLocator(2))
    strip.spines.bottom.set_visible(False)
    strip.tick_params(bottom=False, labelbottom=False)
    axes.spines.top.set_visible(False)
    slant: dict[str, Any] = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 9, "linestyle": "none", "color": "black"}
    for panel, height in ((strip, 0), (axes, 1)):
        panel.plot([0, 1], [height, height], transform=panel.transAxes, clip_on=False, **slant)
    return axes, strip


def _distinct(scores: Mapping[str, float]) -> dict[str, str]:
    """Scores as text with three significant digits, or as many as it takes to tell one from the others, up to six."""
    texts: dict[str, str] = {}
    for name, score in scores.items():
        for digits in range(3, 7):
            texts[name] = significant(score, digits)
            if all(significant(other, digits) != texts[name] for other in scores.values() if other != score):
                break
    return texts


def _label_right(axes: Axes, labels: Mapping[str, tuple[float, str]]) -> None:
    """Names, each with a height and a colour, to the right of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    step = 12 * DOTS_PER_INCH / 72 / axes.get_window_extent().height * (high - low)  # 12 points, in axis units
    ordered = sorted(labels.items(), key=lambda item: item[1][0])
    positions: list[float] = []
    for _, (value, _) in ordered:
        positions.append(max(value, positions[-1] + step) if positions else value)
    ceiling = high
    for index in reversed(range(len(positions))):
        positions[index] = min(positions[index], ceiling)
        ceiling = positions[index] - step
    line: dict[str, Any] = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
    for (label, (value, colour)), position in zip(ordered, positions, strict=True):
        axes.annotate(
            label,
            xy=(1, value),
            xytext=(1.025, position),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops={**line, "color": colour},
            annotation_clip=False,
            parse_math=False,
        )


def set_title(figure: Figure, title: str) -> None:
    """Put ``title`` above the figure, at the left."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, wrap=True, parse_math=False)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG or an SVG, as the suffix says, whole or not at all.

    An SVG has text as text, no background, and the same bytes every time.

    Raises:
        HalfbyteError: another suffix, or the file cannot be written.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg"):
        raise HalfbyteError(f"{path}: plots are PNG or SVG files", fix="choose a name that ends in .png")
    with whole_file(path) as partial:
        if kind == ".png":
            FigureCanvasAgg(figure)
            figure.savefig(partial, format="png", dpi=DOTS_PER_INCH)
            return
        for axes in figure.axes:  # gaps that are grey stay grey
            if axes.get_facecolor() == to_rgba("white"):
                axes.set_facecolor("none")
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "halfbyte"}):
            figure.savefig(partial, format="svg", facecolor="none", metadata={"Date": None})
