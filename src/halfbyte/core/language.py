"""What people read in their language: the English text is the key of a catalogue in ``catalogues/``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

CATALOGUES = Path(__file__).parent / "catalogues"
ENGLISH = "en"
_chosen: ContextVar[str] = ContextVar("language", default=ENGLISH)


def languages() -> tuple[str, ...]:
    """English, and those that have a catalogue."""
    return (ENGLISH, *sorted(path.stem for path in CATALOGUES.glob("*.json")))


def own_language() -> str:
    """That of the locale (POSIX.1-2017, section 8.2: LC_ALL, else LC_MESSAGES, else LANG) if there is a catalogue."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    short = re.split("[_.@-]", locale)[0].lower()
    return short if short in languages() else ENGLISH


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """Inside, :func:`say` answers in this language; ``auto`` is the locale's."""
    before = _chosen.set(own_language() if language == "auto" else language)
    try:
        yield
    finally:
        _chosen.reset(before)


def spoken() -> str:
    """The language at the moment."""
    return _chosen.get()


def say(text: str, /, **values: object) -> str:
    """``text`` in the language at the moment, with ``{name}`` replaced by values."""
    return _catalogue(spoken()).get(text, text).format(**values)


@cache
def _catalogue(language: str) -> dict[str, str]:
    if language == ENGLISH:
        return {}
    return json.loads((CATALOGUES / f"{language}.json").read_text(encoding="utf-8"))
