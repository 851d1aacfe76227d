"""What benchmarks share: arguments, a model with windows of text, rows that are kept after each one, medians."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from halfbyte.calibration.text import Text, cut, load_text
from halfbyte.core.environment import cores, cpu_name
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_output, write_text
from halfbyte.models.loading import SourceModel, find, load

Row = dict[str, Any]  # of a table, as its JSON file has it


def arguments(
    about: str | None, *, model: str | None = "demo", device: bool = True, text: str | None = "auto"
) -> argparse.ArgumentParser:
    """The flags that most benchmarks have.

    Args:
        about: the script's docstring.
        model: default of ``--model``; None leaves the flag out.
        device: whether there is ``--device``.
        text: default of ``--text``; None leaves the flag out.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model is not None:
        parser.add_argument("--model", default=model, help="Hugging Face id, local folder, .gguf file, or demo")
    if device:
        parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    if text is not None:
        help_text = "auto (wikitext2, else pydoc, mixed with code), wikitext2, pydoc, code, a file, or a list"
        parser.add_argument("--text", default=text, help=help_text)
    parser.add_argument("--json", help="also write the rows here, after each one")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the --json file already")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; a --json file that exists is refused before any work."""
    options = parser.parse_args()
    if options.json and not options.resume:
        check_output(options.json, force=options.force)
    return options


class Rows:
    """The rows of a table, written to the ``--json`` file after each one, and found there again by ``--resume``.

    Args:
        options: with ``json`` and ``resume``.
        made_by: what the numbers depend on: model, text, machine, settings.

    Raises:
        HalfbyteError: the file that should be resumed was made otherwise.
    """

    def __init__(self, options: argparse.Namespace, made_by: Row) -> None:
        self.made_by, self.rows = json.loads(json.dumps(made_by)), list[Row]()
        self._path = Path(options.json) if options.json else None
        if self._path and options.resume and self._path.exists():
            before = json.loads(self._path.read_text(encoding="utf-8"))
            if before["made_by"] != self.made_by:
                raise HalfbyteError(
                    f"{self._path}: was made otherwise, expected {self.made_by}, got {before['made_by']}",
                    fix="write another file, or start over with --force",
                )
            self.rows = before["rows"]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def add(self, row: Row) -> None:
        """One more."""
        self.rows.append(row)
        self.keep()

    def keep(self) -> None:
        """Write them all; called by :meth:`add`, and after a row has changed."""
        if self._path:
            write_text(self._path, json.dumps({"made_by": self.made_by, "rows": self.rows}, indent=1))


@dataclass(frozen=True)
class Loaded:
    """A model in main memory, and the text that it is measured on."""

    source: SourceModel
    text: Text

    def windows(
        self, part: str | tuple[str, ...], ctx: int, count: int | None = None, *, spread: bool = True
    ) -> torch.Tensor:
        """Windows of ``ctx`` tokens of a part of the text, int64 ``[windows, ctx]``.

        Args:
            part: ``calib``, ``search``, ``valid`` or ``eval``, or several of them one after the other.
            count: at most so many; None is all there are.
            spread: over the whole part, else its first.
        """
        parts = (part,) if isinstance(part, str) else part
        text = "".join(self.text.parts[name] for name in parts)
        ids = self.source.tokenizer(text, add_special_tokens=False).input_ids
        spread = spread and count is not None
        return torch.tensor(cut(ids, ctx, count or len(ids), spread=spread, where=" and ".join(parts)))

    @property
    def made_by(self) -> Row:
        """Which model and text."""
        return {"fingerprint": self.source.fingerprint, "text": self.text.record()}


def load_model(model: str, text: str, dtype: torch.dtype = torch.float32) -> Loaded:
    """A model and a text by their names."""
    return Loaded(load(find(model), device=torch.device("cpu"), dtype=dtype), load_text(text))


def machine() -> str:
    """The CPU and its cores."""
    return f"{cpu_name()}, {cores()} cores"


def medians(jobs: Sequence[Callable[[], Sequence[float]]], rounds: int) -> list[list[float]]:
    """Medians of what each job returns; the jobs take turns in every round, so that they compare on a busy machine."""
    seen: list[list[Sequence[float]]] = [[] for _ in jobs]
    for _ in range(rounds):
        for job, runs in zip(jobs, seen, strict=True):
            runs.append(job())
    return [[statistics.median(values) for values in zip(*runs, strict=True)] for runs in seen]


def run(main: Callable[[], int | None]) -> None:
    """Run a script; what the user can put right is one line."""
    disable_progress_bar()
    try:
        sys.exit(main())
    except HalfbyteError as error:
        sys.exit(str(error))
