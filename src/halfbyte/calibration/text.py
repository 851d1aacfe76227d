"""Text for calibration, search and evaluation, and the promise that they never overlap.

A source is a name (``wikitext2``, ``pydoc``, ``code``, ``self``), a file, or several of these. Each gives four disjoint
parts: ``calib`` for statistics, ``search`` for fitness, ``valid`` to decide between the best, ``eval`` for the final
numbers. A single text is cut at line ends into the first half, the next 10 %, 10 % more, and, after a gap of 2 %, the
rest. The tokens of a part are cut into windows. Importing this module imports no torch, so that small workers can use
it.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.core import environment as hub
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import home_expanded

if TYPE_CHECKING:
    from torch import nn

CODE_CHARACTERS, PIECE = 500_000, 2000  # characters of code, and of each text in a mixture until the next one's turn
CUTS = {"calib": (0.0, 0.50), "search": (0.50, 0.60), "valid": (0.60, 0.70), "eval": (0.72, 1.0)}


@dataclass(frozen=True)
class Text:
    """Disjoint parts of one source.

    Attributes:
        name: what was really used ("pydoc", "wikitext2", a path).
        parts: ``calib``, ``search``, ``valid`` and ``eval`` text.
        note: empty, or why another source than the one asked for was used.
        mixed: the texts that it is a mixture of.
    """

    name: str
    parts: dict[str, str]
    note: str = ""
    mixed: tuple[Text, ...] = ()

    def record(self) -> dict[str, str]:
        """Name, note and digest of each part, for the plan and for reports; ``search`` has those of mixed texts too."""
        digests = {part: hashlib.sha256(text.encode()).hexdigest()[:16] for part, text in self.parts.items()}
        digests["search"] = ",".join((digests["search"], *(text.record()["search"] for text in self.mixed)))
        return {"name": self.name, "note": self.note, **digests}


def split(text: str) -> dict[str, str]:
    """Cut one text at line ends into disjoint parts (shares in ``CUTS``)."""
    longest = max(PIECE, len(text) // 50)
    lines = []
    for line in text.splitlines(keepends=True):  # a text without line ends is cut where it happens to be
        lines += [line] if len(line) <= longest else [line[at : at + PIECE] for at in range(0, len(line), PIECE)]
    ends, total = [], 0
    for line in lines:
        total += len(line)
        ends.append(total)
    parts = {}
    for part, (first, last) in CUTS.items():
        parts[part] = "".join(
            line
            for line, end in zip(lines, ends, strict=True)
            if first * total < end <= last * total or (first == 0 and end == 0)
        )
    return parts


def pydoc_text() -> str:
    """Python's own language reference, as shipped in the standard library (465 kB of technical English)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _pydoc() -> Text:
    return Text("pydoc", split(pydoc_text()))


def _wikitext2() -> Text:
    """WikiText-2 raw (Merity et al. 2016, arXiv:1609.07843), the archive that llama.cpp's scripts use.

    Calibration, search and validation text come from its training part, evaluation text is its test part.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(
            "ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset", local_files_only=not hub.reachable()
        )
    except (OSError, ValueError) as error:
        raise HalfbyteError(
            "--calib/--text: wikitext2 is neither cached nor downloadable", fix="use pydoc or a file"
        ) from error
    try:
        with zipfile.ZipFile(path) as archive:
            raw = {part: archive.read(f"wikitext-2-raw/wiki.{part}.raw").decode() for part in ("train", "test")}
    except (zipfile.BadZipFile, KeyError) as error:
        raise HalfbyteError(f"{path}: wikitext2 archive is damaged", fix="delete it, or use pydoc") from error
    train = split(raw["train"])
    return Text("wikitext2", {**train, "eval": raw["test"]})


def _file(path: Path) -> Text:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HalfbyteError(f"{path}: not a UTF-8 text file") from error
    except OSError as error:
        raise HalfbyteError(f"{path}: text cannot be read, got {error.strerror or error}") from error
    if not text.strip():
        raise HalfbyteError(f"{path}: the text is empty, expected more than spaces and line ends")
    return Text(str(path), split(text))


def _code() -> Text:
    """Modules of the running Python's standard library, in alphabetical order, about as much as ``pydoc``."""
    found, total = [], 0
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if total + len(text) <= CODE_CHARACTERS:
            found.append(text)
            total += len(text)
    return Text("code", split("\n".join(found)))


def _mixed(texts: Sequence[Text]) -> Text:
    """Of every part as much from each text as the shortest has, a piece of each in turn."""
    parts = {}
    for part in CUTS:
        shortest = min(len(text.parts[part]) for text in texts)
        starts = range(0, shortest, PIECE)
        pieces = [text.parts[part][at : min(at + PIECE, shortest)] for at in starts for text in texts]
        parts[part] = "\n".join(pieces)
    return Text(
        ",".join(text.name for text in texts),
        parts,
        "; ".join(text.note for text in texts if text.note),
        tuple(texts),
    )


SOURCES: dict[str, Callable[[], Text]] = {"pydoc": _pydoc, "wikitext2": _wikitext2, "code": _code}


def load_text(name: str, *, written_by_model: Callable[[], str] | None = None) -> Text:
    """The text called ``name``: ``auto``, a source, ``self``, or a file.

    ``auto`` is a mixture of general text (wikitext2; where that cannot be had pydoc, and it says so) and code.

    Args:
        name: see above; several, joined by commas, are mixed.
        written_by_model: makes the text for ``self``.

    Raises:
        HalfbyteError: no such source or file, or it cannot be read.
    """
    path = home_expanded(name)
    if "," in name and not path.exists():
        found = [load_text(one.strip(), written_by_model=written_by_model) for one in name.split(",")]
        single = {one.name: one for text in found for one in text.mixed or (text,)}  # of mixtures their parts
        return _mixed(list(single.values())) if len(single) > 1 else found[0]
    if name == "auto":
        try:
            general = _wikitext2()
        except HalfbyteError as error:
            general = Text("pydoc", _pydoc().parts, note=f"wikitext2 was not available ({error.text})")
        return _mixed([general, _code()])
    if name == "self":
        if written_by_model is None:
            raise HalfbyteError("--calib self: no model to write the text")
        return Text("self", split(written_by_model()))
    if name in SOURCES:
        return SOURCES[name]()
    if not path.exists():
        raise HalfbyteError(f"{name}: no such text, expected auto, self, {', '.join(SOURCES)} or a file")
    return _file(path)


def text_files(name: str) -> list[str]:
    """The files among the texts that ``name`` stands for."""
    found = [name] if home_expanded(name).exists() else [one.strip() for one in name.split(",")]
    return [str(home_expanded(one)) for one in found if one not in ("auto", "self", *SOURCES)]


def write_with(model: nn.Module, tokenizer: Any, *, seed: int, samples: int = 24, length: int = 384) -> str:
    """Text that a model writes itself, sampled at temperature 1 from one random first token per sample.

    Cf. LLM-QAT (Liu et al. 2023, arXiv:2305.17888), which generates its training data so.
    """
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(tokenizer), (samples, 1), generator=generator)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = model.generate(  # pyright: ignore[reportCallIssue]
            first.to(device),
            attention_mask=torch.ones_like(first).to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=length,
            min_new_tokens=length,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    return "\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True))


def cut(
    token_ids: Sequence[int], length: int, count: int, *, spread: bool = False, where: str = "text"
) -> list[list[int]]:
    """At most ``count`` windows of ``length`` tokens.

    Args:
        spread: take windows evenly over the whole text, instead of the first ones in a row (as llama.cpp does).
        where: what to name in an error.

    Raises:
        HalfbyteError: the text is shorter than one window.
    """
    whole = len(token_ids) // length
    if whole < 1:
        raise HalfbyteError(
            f"{where}: text is shorter than one window, expected {length} tokens, got {len(token_ids)}",
            fix="use a longer text or a smaller --ctx",
        )
    count = min(count, whole)
    starts = [(index * whole // count if spread else index) * length for index in range(count)]
    return [list(token_ids[start : start + length]) for start in starts]


def scored(token_ids: Sequence[int], ctx: int, chunks: int, *, bos: int | None, where: str) -> list[list[int]]:
    """The first ``chunks`` windows of ``ctx`` tokens, for evaluation, as llama.cpp's perplexity tool cuts them.

    If ``bos`` is given, it is put in front of the text, and then replaces the first token of each window.

    Raises:
        HalfbyteError: the text is shorter than one window, or ``ctx`` too small to score anything.
    """
    if ctx < 4:
        raise HalfbyteError(f"--ctx: context is too short, expected at least 4, got {ctx}")
    if chunks < 1:
        raise HalfbyteError(f"--chunks: must be positive, got {chunks}")
    if bos is None:
        return cut(token_ids, ctx, chunks, where=where)
    return [[bos, *window[1:]] for window in cut([bos, *token_ids], ctx, chunks, where=where)]


def scored_of_each(
    tokenize: Callable[[str], Sequence[int]],
    texts: Mapping[str, str],
    ctx: int,
    chunks: int,
    *,
    bos: int | None,
    where: str,
) -> tuple[list[list[int]], list[str]]:
    """Windows of several texts, as many of each as of the others, and the name of the text of each window.

    Args:
        texts: name -> text.
        chunks: windows of all texts together, the first ones having one more where that cannot be even; a text that is
            too short has fewer.

    Raises:
        HalfbyteError: see :func:`scored`.
    """
    windows, names = [], []
    for at, (name, text) in enumerate(list(texts.items())[:chunks]):
        share = chunks // len(texts) + (at < chunks % len(texts))
        own = scored(tokenize(text), ctx, share, bos=bos, where=name if len(texts) > 1 else where)
        windows += own
        names += [name] * len(own)
    return windows, names


def first_scored(ctx: int) -> int:
    """Position of the first prediction that is scored in a window of ``ctx`` tokens; the last is ``ctx - 2``."""
    return ctx // 2


def scored_tokens(ctx: int) -> int:
    """How many predictions are scored in a window of ``ctx`` tokens."""
    return ctx - first_scored(ctx) - 1
