"""Intermediate results on disk, so that an interrupted search can go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte.core.distributed import processes
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import write_text
from halfbyte.core.schema import read_json

RECORD, CODES = "settings.json", "codes.safetensors"
CANDIDATES = "candidates"  # folder of encoded matrices


def work_folder(output: Path) -> Path:
    """Where the stages of a search are kept until its plan stands."""
    return output.with_name(f".{output.name}.work")


def refuse_waiting(output: Path) -> None:
    """Refuse to start over what could be resumed.

    Raises:
        HalfbyteError: an interrupted search is waiting.
    """
    if any((work_folder(output) / name).exists() for name in (CODES, CANDIDATES)):
        raise HalfbyteError(
            f"{work_folder(output)}: an interrupted search is waiting",
            fix="go on with it: --resume; or start over: --force",
        )


def remove_if_done(output: Path) -> None:
    """Remove the work folder of a search that was killed when its plan, which is written last, stood."""
    folder = work_folder(output)
    record = folder / RECORD
    if output.is_file() and record.is_file() and output.stat().st_mtime >= record.stat().st_mtime:
        shutil.rmtree(folder, ignore_errors=True)


def _check_ours(folder: Path) -> None:
    """Refuse a work folder that no search has made."""
    if not os.path.lexists(folder):
        return
    made = folder.is_dir() and not folder.is_symlink()
    if not made or ((names := os.listdir(folder)) and RECORD not in names and any(name[0] != "." for name in names)):
        raise HalfbyteError(
            f"{folder}: will not replace what is no work folder of halfbyte",
            fix="move it away, or choose another --output",
        )


class Workdir:
    """Intermediate results in a folder beside the output, valid for one set of settings.

    Args:
        output: the plan to be written; the folder is ``.NAME.work`` beside it.
        settings: everything the results depend on; a resumed run must have the same.
        resume: keep what is there; otherwise start empty.

    Raises:
        HalfbyteError: resuming with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.folder = work_folder(output)
        if processes().first:
            resume = self._open(settings, resume=resume)
        self.resumed = processes().from_first(resume)
        self.shared = (self.folder / RECORD).exists()  # else what arrives in the folder is this process's own

    def _open(self, settings: dict[str, Any], *, resume: bool) -> bool:
        """Whether there is something to go on with; otherwise the folder is empty."""
        record = self.folder / RECORD
        _check_ours(self.folder)
        if resume and record.exists():
            before = read_json(record, "work file", fix="start over with --force")
            changed = [key for key in settings if before.get(key) != settings[key]]
            if changed:
                raise HalfbyteError(
                    "--resume: the interrupted search had other settings, expected "
                    f"{changed[0]}={before.get(changed[0])}, got {settings[changed[0]]}",
                    fix="use the same settings, or start over with --force",
                )
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(record, json.dumps(settings, indent=1))
        return False

    def value(self, name: str, compute: Callable[[], Any], *, of: Path | None = None) -> Any:
        """A JSON value, computed once (by all processes together) and read back by a resumed run.

        Args:
            of: the file that it was measured on; if that has gone beside a plan that was not written, measure again.
        """
        path = self.folder / f"{name}.json"
        text = read_kept(path)
        if text not in (None, "null") and of is not None and not of.exists():
            text = None
        text = processes().from_first(text)
        if text is None:
            text = processes().from_first(json.dumps(compute()))  # equal to the last bit everywhere
            if processes().first:
                write_kept(path, text)
        return json.loads(text)

    @property
    def codes(self) -> Path:
        """The W4 codes while the search runs; when the plan stands they have moved beside it."""
        return self.folder / CODES

    @property
    def candidates(self) -> Path:
        """Folder of the encoded matrices to choose from."""
        return self.folder / CANDIDATES

    def types(self, like: str = "") -> Path:
        """The encoded matrices of the winner, or of another point of a front, until the plan stands."""
        return self.folder / f"types{like and '-'}{like}.safetensors"

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        """Leave the folder only if a search failed that can be resumed."""
        waiting = failed is not None and (self.codes.exists() or self.candidates.exists())
        if not (waiting if processes().first else self.shared):
            shutil.rmtree(self.folder, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_kept(path: Path, text: str) -> None:
    """Keep a text for a resumed run, below its digest."""
    write_text(path, f"{_digest(text)}\n{text}")


def read_kept(path: Path) -> str | None:
    """A text that was kept; None if there is none or it is damaged: then what it says is computed again."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return text if digest == _digest(text) else None
