"""Files that appear whole or not at all, and their default names, so that one command finds what another wrote."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from halfbyte.core.errors import HalfbyteError

MODELS = Path("models")  # where files of models go by default
DEMO, DEMO_NAME = "demo", "SmolLM2-135M-Instruct"  # what ``--model_id`` calls it, and what it is
MANIFEST = "halfbyte.json"  # of a folder that halfbyte wrote: among other things the names of its files
EXPORTED = (".json", ".safetensors", ".jinja", ".model", ".txt")  # its suffixes, in versions that named no files
OWNER = ".owner"  # of a scratch folder: locked as long as its process lives
TOO_YOUNG = 10.0  # seconds after which a scratch folder has its lock


def home_expanded(name: str | Path) -> Path:
    """With ``~`` expanded; as it is where there is no such home folder."""
    return Path(os.path.expanduser(name))


def check_output(path: str | Path, *, force: bool = False) -> Path:
    """Refuse, before any work, an output that exists (without ``force``) or cannot be written.

    Raises:
        HalfbyteError: that it does, or why it cannot; a device or a folder is never replaced.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise HalfbyteError(f"{path}: output is a folder, expected a file name")
        if os.path.lexists(path):
            if not force:
                raise HalfbyteError(f"{path}: output already exists", fix="choose another name or pass --force")
            if path.exists() and not path.is_file():
                raise HalfbyteError(f"{path}: output is no plain file", fix="choose another name")
        writable_ancestor(path)
    except OSError as error:
        raise HalfbyteError(
            f"{path}: cannot be written, got {error.strerror or error}", fix="choose another name"
        ) from error
    return path


def writable_ancestor(path: Path) -> None:
    """Refuse a path under whose folder, or the next one above that exists, nothing can be made.

    Raises:
        HalfbyteError: why not.
    """
    folder = next(above for above in path.absolute().parents if os.path.lexists(above))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise HalfbyteError(
            f"{folder}: folder cannot be written, got {error.strerror or error}", fix="choose another --output"
        ) from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it into place, else remove it.

    Raises:
        HalfbyteError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        with open(partial, "r+b") as handle:
            os.fsync(handle.fileno())
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left half-written of ``path``, which nobody may be writing now.

    A folder that was moved aside to be replaced, and never was, goes back.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+\.(old|partial)({re.escape(path.suffix)})?")
    for left in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        found = pattern.fullmatch(left.name)
        if found and found[1] == "old" and not os.path.lexists(path):
            left.rename(path)
        elif found:
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_output_folder(path: str | Path, *, force: bool = False) -> Path:
    """Refuse, before any work, an output folder that exists (without ``force``) or that cannot be made.

    With ``force`` a folder is replaced that is empty or holds only what halfbyte wrote there, as its ``halfbyte.json``
    says.

    Raises:
        HalfbyteError: why not.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not path.is_dir():
        raise HalfbyteError(f"{path}: output is a file, expected the name of a folder")
    if path.is_dir():
        if not force:
            raise HalfbyteError(f"{path}: output already exists", fix="choose another name or pass --force")
        try:
            strangers = sorted({entry.name for entry in path.iterdir()} - written_names(path))
        except OSError as error:
            raise HalfbyteError(f"{path}: folder cannot be read, got {error.strerror or error}") from error
        if strangers or path.is_symlink() or os.path.ismount(path):
            raise HalfbyteError(
                f"{path}: will not replace a folder that holds what halfbyte did not write, got "
                f"{', '.join(strangers[:3]) or 'a link or a mount point'}",
                fix="choose another name",
            )
    writable_ancestor(path)
    return path


def written_names(folder: Path) -> set[str]:
    """Names of the files in a folder that halfbyte wrote; none if it did not write the folder."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if "files" not in record and {"plan", "fingerprint"} <= set(record):  # versions before this one named no files
            found = [path.name for path in folder.iterdir() if path.suffix in EXPORTED or path.name == "README.md"]
        else:
            found = record["files"]
        return {MANIFEST, *(name for name in found if (folder / name).is_file())}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success rename it into place, else remove it.

    A folder that is there is replaced, and back again if that fails.

    Raises:
        HalfbyteError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had the same id
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            with open(file, "r+b") as handle:
                os.fsync(handle.fileno())
        if path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def scratch_folder(within: Path | None = None) -> Iterator[Path]:
    """A folder of this process alone, removed when it is closed; those of processes that were killed go too.

    Args:
        within: where it is made; by default where the system has temporary files.
    """
    place = Path(tempfile.gettempdir()) if within is None else within
    for other in place.glob("halfbyte-*"):
        with suppress(OSError, Timeout):  # of somebody else, or in use
            owner = other / OWNER
            if owner.is_file() and time.time() - owner.stat().st_mtime > TOO_YOUNG:
                with FileLock(owner, timeout=0):
                    shutil.rmtree(other, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="halfbyte-", dir=place))
    try:
        with FileLock(folder / OWNER):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_space(path: str | Path, nbytes: int) -> None:
    """Refuse, before writing, what does not fit on the disk of ``path``."""
    free = shutil.disk_usage(Path(path).parent).free
    if nbytes > free:
        raise HalfbyteError(
            f"{path}: disk is too small for the file, expected {nbytes / 1e9:.2f} GB free, got {free / 1e9:.2f} GB",
            fix="free some space or write elsewhere",
        )


@cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_error(error: OSError, path: str | Path) -> HalfbyteError:
    """What an operating-system error while writing ``path`` means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HalfbyteError(
            f"{path}: disk is full, so it was not written",
            fix="free some space and run the command again (a search goes on with --resume), or write elsewhere",
        )
    return HalfbyteError(
        f"{path}: cannot be written, got {error.strerror or error}", fix="check the path and its permissions"
    )


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text, whole or not at all; returns the path."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted tokenizers and text are kept: ``$HALFBYTE_CACHE``, else ``~/.cache/halfbyte``."""
    return Path(os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte")


def short_name(model_id: str) -> str:
    """``Qwen/Qwen2.5-7B-Instruct`` -> ``Qwen2.5-7B-Instruct``; of a file, its name without suffix."""
    if model_id == DEMO:
        return DEMO_NAME
    path = Path(model_id)
    return path.stem if path.suffix == ".gguf" else path.name


def is_hub_id(model_id: str) -> bool:
    """Whether it looks like ``owner/name``, and not like something on this machine."""
    path = Path(model_id)
    return len(path.parts) == 2 and not path.is_absolute() and path.suffix != ".gguf" and not path.exists()


def mixed_gguf(model_id: str) -> Path:
    """Where the mixed GGUF file of a model goes: ``models/qwen2.5-7b-mixed.gguf``."""
    return MODELS / f"{short_name(model_id).lower().removesuffix('-instruct')}-mixed.gguf"


def mixed_folder(model_id: str) -> Path:
    """Where the folder for vLLM goes: ``models/qwen2.5-7b-mixed-vllm``."""
    return mixed_gguf(model_id).with_name(f"{mixed_gguf(model_id).stem}-vllm")


def q4km_gguf(model_id: str) -> Path:
    """Where its Q4_K_M file is looked for: the name that download repositories use, in whatever letter case."""
    path = MODELS / f"{short_name(model_id)}-Q4_K_M.gguf"
    found = sorted(MODELS.glob("*.gguf")) if not path.exists() else []
    return next((other for other in found if other.name.lower() == path.name.lower()), path)


def f16_gguf(model_id: str) -> Path:
    """Where the original as F16 GGUF goes."""
    return MODELS / f"{short_name(model_id)}-F16.gguf"


def download_command(model_id: str) -> str:
    """How to get a ready Q4_K_M file of a model from the hub."""
    name = short_name(model_id)
    return f"hf download bartowski/{name}-GGUF {name}-Q4_K_M.gguf --local-dir {MODELS}"
