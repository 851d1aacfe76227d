"""What a command will read and write, looked at before any work: nothing is lost, and nobody writes the same thing.

A command names all its inputs and outputs. Refused are two outputs in one file, an output that is an input or lies
inside one, one that exists (without ``--force``) or is no plain file, a folder that holds what halfbyte did not write,
and a place that cannot be written. Every output is locked while the command runs, by a file beside it that names the
process; the lock of a process that has ended, however it ended, is taken over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLock, Timeout

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import DEMO, check_output, check_output_folder, remove_leftovers

StrPath = str | os.PathLike[str]
# how names in a model folder begin that loading it looks for
LOADED = ("model", "pytorch_model", "config", "generation_config", "tokenizer", "vocab", "merges", "added_tokens")
LOADED += ("special_tokens", "chat_template", "adapter")


@dataclass(frozen=True)
class Touched:
    """What a command reads and writes.

    Attributes:
        inputs: files, and folders with all that is in them; what does not exist, such as a hub id, is no file.
        outputs: files that the command makes.
        folder: a folder that it makes.
        kept: files that an interrupted run of the same command has left, which may be there.
        work: a folder for itself while it works.
        shared: files that it makes where they are missing, and keeps for later commands.
    """

    inputs: Sequence[StrPath] = ()
    outputs: Sequence[Path] = ()
    folder: Path | None = None
    kept: Sequence[Path] = ()
    work: Path | None = None
    shared: Sequence[Path] = ()


@contextmanager
def guarded(touched: Touched, *, json: str | None, force: bool) -> Iterator[None]:
    """Lock the outputs, remove what killed runs left of them, check everything, and let the command work.

    Args:
        json: the ``--json`` file, one more output.

    Raises:
        HalfbyteError: what is refused, or that another process is writing the same.
    """
    outputs = [*touched.outputs, *([Path(json)] if json else [])]
    folders = [folder for folder in (touched.folder, touched.work) if folder is not None]
    _check_apart(outputs, folders)
    _check_inputs([*outputs, *folders], folders, [Path(path) for path in touched.inputs if os.path.lexists(path)])
    everything = [*outputs, *folders, *touched.shared]
    alone = (*touched.outputs[:1], *outputs[len(touched.outputs) :], *touched.shared)
    locks = [_lock_of(path, path.stem) for path in alone]
    if touched.folder is not None:
        locks.append(_lock_of(touched.folder, touched.folder.name))
    made: list[Path] = []
    try:
        for path in everything:
            _make_parents(path, made)
        with ExitStack() as stack:
            for lock in dict.fromkeys(locks):
                stack.enter_context(_locked(lock))
            for path in everything:
                remove_leftovers(path)
            for path in outputs:
                check_output(path, force=force or path in touched.kept)
            if touched.folder is not None:
                check_output_folder(touched.folder, force=force)
            yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def inside(path: StrPath, folder: StrPath) -> bool:
    """Whether ``path`` is ``folder`` or lies in it, links followed."""
    here, there = real(path), real(folder)
    return here == there or there in here.parents


def real(path: StrPath) -> Path:
    """Where a path leads; links that go in a circle lead to themselves."""
    return Path(os.path.realpath(path))


def model_files(model_id: str) -> list[str]:
    """What is read of a model, if it is on this machine: ``demo`` is none of the user's files, whatever they have."""
    return [] if model_id == DEMO else [model_id]


def _same(one: Path, other: Path) -> bool:
    if real(one) == real(other):
        return True
    with suppress(OSError):  # hard links, and file systems that do not tell upper case from lower
        return one.samefile(other)
    return False


def _check_apart(outputs: Sequence[Path], folders: Sequence[Path]) -> None:
    for at, path in enumerate(outputs):
        if any(_same(path, other) for other in outputs[:at]):
            raise HalfbyteError(f"{path}: two outputs in one file", fix="give one of them another name")
        if any(inside(path, folder) for folder in folders):
            raise HalfbyteError(f"{path}: an output in the folder of another", fix="give one of them another name")


def _check_inputs(written: Iterable[Path], folders: Sequence[Path], inputs: Sequence[Path]) -> None:
    for path in written:
        for source in inputs:
            if _same(path, source):
                raise HalfbyteError(
                    f"{path}: would be written over {source}, which is read", fix="choose another name for the output"
                )
            if source.is_dir() and inside(path, source) and (os.path.lexists(path) or path.name.startswith(LOADED)):
                raise HalfbyteError(
                    f"{path}: would be written into {source}, which is read", fix="choose another folder for the output"
                )
            if path in folders and inside(source, path):
                raise HalfbyteError(f"{path}: holds {source}, which is read", fix="choose another name for the output")


def _make_parents(path: Path, made: list[Path]) -> None:
    """Make the folders above an output; those that were not there are added to ``made``."""
    try:
        for folder in reversed(path.absolute().parents):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                made.append(folder)
    except OSError as error:
        raise HalfbyteError(
            f"{path.parent}: folder cannot be written, got {error.strerror or error}", fix="choose another name"
        ) from error


def _lock_of(path: Path, name: str) -> Path:
    """The lock of an output; a file's is that of all files of the same stem, which are written beside it."""
    return real(path.parent) / f".{name}.lock"


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    held = SoftFileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise HalfbyteError(
            f"{lock.parent / lock.stem[1:]}: another run is writing it now",
            fix=f"wait until it has ended, or choose another name; if none runs on any machine, remove {lock}",
        ) from error
    except OSError as error:
        raise HalfbyteError(f"{lock}: cannot be written, got {error.strerror or error}") from error
    try:
        yield
    finally:
        held.release()
