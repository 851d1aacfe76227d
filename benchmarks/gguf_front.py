"""Size against quality of GGUF files: llama.cpp's recipes with an importance matrix, and any files beside them.

    python mixed_precision_ptq.py --model_id DIR --spaces types --pareto --output PLAN
    python benchmarks/gguf_front.py --model DIR --work DIR --plan PLAN [--json OUT] [--plot OUT.png] [--tool PATH]

The model becomes an F16 file, which is the reference, and the recipes are made from that file with an importance matrix
of the calibration part of the text. Every file is then run by llama.cpp on the evaluation part: mean KL (nats per
token) and its 99th percentile against the F16 file, top-1 agreement, perplexity. Points of our front are no larger than
llama.cpp's file of the same name; the ratio of their KL is printed. ``--rounds`` adds speeds, taken in rounds, one file
after the other, of which the median counts; they compare within one run only. ``--tool`` is llama.cpp's own
llama-perplexity, whose KL is then put beside ours. For a fair comparison of formats take a model whose weights lie on
no grid (``benchmarks/unaligned.py``).

Files that are made stay in ``--work``, in a folder named after the weights and the calibration text, and are reused.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agreement import by_tool, by_us
from common import Loaded, Row, Rows, arguments, load_model, machine, medians, parse, run
from matplotlib.figure import Figure

from halfbyte.calibration.imatrix import matrices, measure_importance
from halfbyte.calibration.imatrix_file import check_for, read_imatrix, write_imatrix
from halfbyte.calibration.text import scored_tokens
from halfbyte.core.files import check_output
from halfbyte.engines import open_engine
from halfbyte.evaluate.quality import LogitsFile, measure
from halfbyte.menus.types import FRONT_FTYPES
from halfbyte.models.loading import SourceModel
from halfbyte.options import ExportOptions
from halfbyte.report.plots import DOTS_PER_INCH, LINE_COLOURS, SEARCH_COLOUR, save_figure, set_title
from halfbyte.report.tables import Cell, format_bytes, markdown_table, significant
from halfbyte.targets.gguf_files.export import export_gguf
from halfbyte.targets.gguf_files.writer import write_gguf

RECIPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M")
REFERENCE, LLAMACPP, OURS = "reference", "llama.cpp", "halfbyte"
CTX = 512  # tokens per window, as in agreement.py
UPPER_RIGHT: dict[str, Any] = {"xytext": (5, 4), "ha": "left"}  # of a point, where its label goes
UPPER_LEFT: dict[str, Any] = {"xytext": (-5, 4), "ha": "right"}
LOWER_LEFT: dict[str, Any] = {"xytext": (-5, -4), "ha": "right", "va": "top"}
PROMPT, GENERATED = 512, 64  # tokens that are timed
SPEEDS = ("prompt_tokens_per_second", "generation_tokens_per_second")


@dataclass(frozen=True)
class Candidate:
    """One file of the table.

    Attributes:
        label: what the table calls it.
        maker: ``REFERENCE``, ``LLAMACPP`` or ``OURS``.
    """

    label: str
    path: Path
    maker: str


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__, device=False, text="pydoc")
    parser.add_argument("--work", required=True, type=Path, help="folder for the files that are made")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="llama.cpp file types")
    parser.add_argument("--plan", type=Path, help="plan of a search with --pareto, whose front is exported")
    parser.add_argument("--ours", nargs="*", type=Path, default=[], help="more GGUF files of the same model")
    parser.add_argument("--calib_tokens", type=int, default=32768, help="for the importance matrix")
    parser.add_argument("--chunks", type=int, default=24, help=f"windows of {CTX} tokens to score")
    parser.add_argument("--rounds", type=int, default=0, help="of speed; 0 leaves speed out")
    parser.add_argument("--tool", help="llama-perplexity, to put its numbers beside ours")
    parser.add_argument("--plot", help="also draw KL against size, a PNG file")
    options = parse(parser)
    if options.plot:
        check_output(options.plot, force=options.force or options.resume)
    return options


def reference_file(folder: Path, source: SourceModel) -> Candidate:
    """The model as F16 GGUF: what recipes are made from, and what they are compared with."""
    path = folder / "F16.gguf"
    if not path.exists():
        write_gguf(path, source, embedding_type="F16", output_type="F16")
    return Candidate("F16", path, REFERENCE)


def importance_file(folder: Path, loaded: Loaded, tokens: int) -> Path:
    """The importance matrix of ``tokens`` tokens spread over the calibration part of the text."""
    path, source = folder / "imatrix.gguf", loaded.source
    if not path.exists():
        windows = loaded.windows("calib", CTX, max(1, tokens // CTX))
        write_imatrix(path, measure_importance(source, windows, device=source.device, text=loaded.text.name))
    check_for(read_imatrix(path), matrices(source), where=path)
    return path


def recipe_files(folder: Path, reference: Path, importance: Path, recipes: Sequence[str]) -> list[Candidate]:
    """llama.cpp's own file types, made from ``reference``."""
    made = [Candidate(recipe, folder / f"{recipe}.gguf", LLAMACPP) for recipe in recipes]
    for candidate in made:
        if not candidate.path.exists():
            open_engine().quantize(reference, candidate.path, candidate.label, imatrix=importance)
    return made


def our_files(folder: Path, plan: Path) -> list[Candidate]:
    """The front of ``plan`` as files, each checked by the export."""
    found = []
    for ftype in FRONT_FTYPES:
        config = plan.with_name(f"{plan.stem}.{ftype}{plan.suffix}")
        if config.exists():
            path = folder / f"halfbyte-{ftype}.gguf"
            export_gguf(ExportOptions(config=str(config), output=str(path), force=True))
            found.append(Candidate(f"at {ftype}", path, OURS))
    return found


class Ruler:
    """Measures files against the reference on one text, by our worker and, if there is one, by llama.cpp's tool."""

    def __init__(self, reference: Path, text: str, chunks: int, scratch: Path, tool: str | None) -> None:
        self.chunks, self.scratch, self.tool = chunks, scratch, tool
        self.text, self._base = scratch / "text.txt", scratch / "base.kld"
        self.text.write_text(text, encoding="utf-8")
        self.reference, self._reference = reference, by_us(str(reference), self.text, self._folder("reference"), chunks)
        if tool:
            by_tool(tool, str(reference), self.text, self._base, chunks, is_reference=True)

    def quality(self, path: Path) -> Row:
        """Fields of :class:`halfbyte.evaluate.quality.Quality`, ``bytes``, ``peak_memory``, ``engine`` and ``tool``."""
        is_reference = path == self.reference
        run = self._reference if is_reference else by_us(str(path), self.text, self._folder("candidate"), self.chunks)
        ours, theirs = self._logits(run), self._logits(self._reference)
        quality = measure(run["windows"], iter(ours), iter(theirs))
        if not is_reference:
            ours.path.unlink()
        known = {key: run[key] for key in ("bytes", "peak_memory", "engine")}
        if self.tool and not is_reference:
            known["tool"] = by_tool(self.tool, str(path), self.text, self._base, self.chunks, is_reference=False)
        return {**known, **vars(quality)}

    def _folder(self, name: str) -> Path:
        (self.scratch / name).mkdir(exist_ok=True)
        return self.scratch / name

    @staticmethod
    def _logits(run: Row) -> LogitsFile:
        return LogitsFile(Path(run["logits_file"]), run["vocab"], scored_tokens(CTX))


def speed_of(path: Path) -> Callable[[], Sequence[float]]:
    """A job that measures tokens per second of a file, prompt and generation."""

    def measured() -> Sequence[float]:
        with open_engine().load(path, n_ctx=max(PROMPT, GENERATED)) as model:
            found = model.speed(PROMPT, GENERATED)
        return found.prompt_tokens_per_second, found.generation_tokens_per_second

    return measured


def ratios(rows: Sequence[Row]) -> list[str]:
    """Our KL as a share of llama.cpp's, one line for each file of theirs that has one of ours at its size."""
    theirs = {f"at {row['label']}": row for row in rows if row["maker"] == LLAMACPP}
    pairs = [(row, theirs[row["label"]]) for row in rows if row["maker"] == OURS and row["label"] in theirs]
    return [
        f"{ours['label']}: KL {ours['kld_mean'] / peer['kld_mean']:.3f} of llama.cpp's, "
        f"in {ours['bytes'] / peer['bytes']:.4f} of the bytes"
        for ours, peer in pairs
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, largest file first."""
    with_tool, with_speed = any("tool" in row for row in rows), any(SPEEDS[0] in row for row in rows)
    headers = ["file", "by", "bytes", "KL", "KL 99%", "top-1", "ppl"]
    headers += ["prompt, tokens/s", "generation, tokens/s"] if with_speed else []
    headers += ["KL, llama-perplexity", "difference"] if with_tool else []
    cells: list[list[Cell]] = []
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        cell: list[Cell] = [row["label"], row["maker"], f"{row['bytes']:,}", significant(row["kld_mean"])]
        cell += [significant(row["kld_p99"]), f"{100 * row['top1_agreement']:.1f}%", significant(row["ppl"], 4)]
        if with_speed:
            cell += [significant(row.get(speed)) for speed in SPEEDS]
        if with_tool:
            theirs = row["tool"]["kld_mean"] if "tool" in row else None
            cell += [significant(theirs), f"{100 * (row['kld_mean'] / theirs - 1):+.1f}%" if theirs else None]
        cells.append(cell)
    return markdown_table(headers, cells)


def plot(path: str | Path, rows: Sequence[Row], *, title: str) -> None:
    """Write a PNG of KL (logarithmic) against size; the reference is left out, its KL is 0.

    Raises:
        HalfbyteError: the file cannot be written.
    """
    figure = Figure(figsize=(6.8, 4.4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    styles: dict[str, dict[str, Any]] = {
        LLAMACPP: {"color": LINE_COLOURS[0], "marker": "x", "linestyle": "none"},
        OURS: {"color": SEARCH_COLOUR, "marker": "o", "linestyle": "--", "linewidth": 0.8},
    }
    for maker, style in styles.items():
        points = sorted((row["bytes"] / 1e6, row["kld_mean"], row["label"]) for row in rows if row["maker"] == maker)
        if points:
            axes.plot([point[0] for point in points], [point[1] for point in points], label=maker, **style)
        for at, (size, loss, label) in enumerate(points):
            place = UPPER_RIGHT if maker == LLAMACPP else LOWER_LEFT
            if at and _meet(points[at - 1], points[at]):
                place = UPPER_RIGHT
            elif at + 1 < len(points) and _meet(points[at], points[at + 1]):
                place = UPPER_LEFT if maker == LLAMACPP else LOWER_LEFT
            text = {**place, "textcoords": "offset points", "fontsize": 8, "parse_math": False}
            axes.annotate(label, (size, loss), color=style["color"], **text)
    axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("file size, MB")
    axes.set_ylabel("KL(F16 ‖ file), nats per token")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    set_title(figure, title)
    save_figure(figure, path)


def _meet(first: tuple[float, float, str], second: tuple[float, float, str]) -> bool:
    """Whether labels beside these points (size, KL, label) would, on the same side."""
    return second[0] < 1.06 * first[0] and 1 / 1.2 < second[1] / first[1] < 1.2


def main() -> int:
    """Make what is missing, measure everything, print one table."""
    options = options_of()
    loaded = load_model(options.model, options.text)
    text = loaded.text
    folder = options.work / f"{loaded.source.fingerprint}-{text.record()['calib']}-{options.calib_tokens}"
    folder.mkdir(parents=True, exist_ok=True)
    reference = reference_file(folder, loaded.source)
    importance = importance_file(folder, loaded, options.calib_tokens)
    made_by = {
        "model": options.model,
        **loaded.made_by,
        "ctx": CTX,
        "calib_tokens": read_imatrix(importance).tokens,
        "chunks": options.chunks,
        "speed_rounds": options.rounds,
        "machine": machine(),
        "engine": open_engine().version,
    }
    del loaded
    rows = Rows(options, made_by)
    candidates = [reference, *recipe_files(folder, reference.path, importance, options.recipes)]
    candidates += our_files(folder, options.plan) if options.plan else []
    candidates += [Candidate(path.stem, path, OURS) for path in options.ours]
    print(f"files are in {folder}", flush=True)
    there = {(row["label"], row["maker"]) for row in rows}
    with tempfile.TemporaryDirectory(prefix="halfbyte-", dir=options.work) as name:
        ruler = Ruler(reference.path, text.parts["eval"], options.chunks, Path(name), options.tool)
        for candidate in candidates:
            if (candidate.label, candidate.maker) in there:
                continue
            found = ruler.quality(candidate.path)
            rows.add({"label": candidate.label, "maker": candidate.maker, **found})
            print(f"{candidate.label}: {format_bytes(found['bytes'])}, KL {significant(found['kld_mean'])}", flush=True)
    if options.rounds:
        by_label = {(row["label"], row["maker"]): row for row in rows}
        found = medians([speed_of(candidate.path) for candidate in candidates], options.rounds)
        for candidate, speeds in zip(candidates, found, strict=True):
            by_label[candidate.label, candidate.maker] |= dict(zip(SPEEDS, speeds, strict=True))
        rows.keep()
    print(f"\n{table(rows.rows)}\n", *ratios(rows.rows), sep="\n")
    print(
        f"{made_by['machine']}, {made_by['engine']}; text {text.name}: {made_by['calib_tokens']} tokens of its first "
        f"half for the importance matrix, {rows.rows[0]['tokens']} scored in {options.chunks} windows of {CTX}"
    )
    if options.plot:
        plot(options.plot, rows.rows, title="GGUF files: KL against size")
    return 0


if __name__ == "__main__":
    run(main)
