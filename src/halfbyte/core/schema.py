"""What is read from files becomes typed values before it is used: one line names the file and the key that is wrong."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from halfbyte.core.errors import HalfbyteError, reading

T = TypeVar("T")
NOTHING_ELSE = {"extra": "forbid"}  # as ``__pydantic_config__`` of a dataclass: unknown keys are refused
LONGEST_JSON = 1 << 28  # bytes


def parsed(kind: type[T], data: object, *, where: object, fix: str | None = None) -> T:
    """``data``, as JSON has it, as a value of ``kind``: a dataclass, or any type that has annotations.

    Raises:
        HalfbyteError: ``where, key: …``, of the first value that is missing, unknown or of another type or range.
    """
    try:
        text = json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise HalfbyteError(f"{where}: expected plain values, got {error}", fix=fix) from error
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        got = repr(first["input"])[:60]
        raise HalfbyteError(f"{where}{key and f', {key}'}: {_lower(first['msg'])}, got {got}", fix=fix) from error


def read_json(path: str | Path, what: str, *, fix: str | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        HalfbyteError: the file is missing, is no JSON, or holds something else than an object.
    """
    with reading(path, what, fix=fix):
        if Path(path).stat().st_size > LONGEST_JSON:
            raise HalfbyteError(f"{path}: {what} is too large, expected at most {LONGEST_JSON >> 20} MiB")
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise HalfbyteError(f"{path}: {what} is no JSON object, got {type(data).__name__}", fix=fix)
    return data


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
