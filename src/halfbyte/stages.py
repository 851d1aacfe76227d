"""Intermediate results on disk, so that an interrupted search can go on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.files import write_text

RECORD, CODES = "settings.json", "codes.safetensors"


def work_folder(output: Path) -> Path:
    """Where the stages of a search are kept until its plan stands."""
    return output.with_name(f".{output.name}.work")


def refuse_waiting(output: Path) -> None:
    """Refuse to start over what could be resumed.

    Raises:
        HalfbyteError: an interrupted search is waiting.
    """
    if (work_folder(output) / CODES).exists():
        raise HalfbyteError(
            "an interrupted search is waiting", where=work_folder(output),
            fix="go on with it: --resume; or start over: --force",
        )  # fmt: skip


class Stages:
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
        record = self.folder / RECORD
        self.resumed = resume and record.exists()
        if self.resumed:
            before = json.loads(record.read_text(encoding="utf-8"))
            changed = [key for key in settings if before.get(key) != settings[key]]
            if changed:
                raise HalfbyteError(
                    "the interrupted search had other settings", where="--resume",
                    expected=f"{changed[0]}={before.get(changed[0])}", got=settings[changed[0]],
                    fix="use the same settings, or start over with --force",
                )  # fmt: skip
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(record, json.dumps(settings, indent=1))

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value, computed once and read back by a resumed run."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_text(path, json.dumps(compute()))
        return json.loads(path.read_text(encoding="utf-8"))

    @property
    def codes(self) -> Path:
        """The W4 codes while the search runs; when the plan stands they have moved beside it."""
        return self.folder / CODES

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the folder only if there is something to resume."""
        if not self.codes.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
