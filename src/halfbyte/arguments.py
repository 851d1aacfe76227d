"""Options as fields of a dataclass: flags of a command, and keyword arguments of a function of the library."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import PurePath
from typing import Any, NoReturn, TypeVar

from halfbyte.core.errors import HalfbyteError

# Groups of ``--help`` and of the option tables; the options of the first, which has no name, matter most.
MAIN, MODEL, WEIGHTS, SEARCH = "", "model and device", "transforms and weights", "search"
TEXT, ENGINE, OUTPUT = "text", "engine", "output"
GROUPS = (MAIN, MODEL, WEIGHTS, SEARCH, TEXT, ENGINE, OUTPUT)

LONGEST_NAME, LONGEST_PATH = 200, 3800  # bytes of a file's name and of its path; temporary names are longer

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

OF_COMMANDS = ("json", "verbose", "lang")  # which functions of the library do not have

Names = Callable[[], tuple[str, ...]]


def option(
    default: Any,
    text: str,
    group: str = MAIN,
    *,
    choices: tuple[str, ...] | Names = (),
    names: Names | None = None,
    alias: str | None = None,
    metavar: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    path: bool = False,
    size: bool = False,
    excludes: tuple[str, ...] = (),
) -> Any:
    """A field of an options dataclass.

    Args:
        text: its help.
        group: one of ``GROUPS``.
        choices: allowed values, or what looks them up; empty if any value will do.
        names: looks up what a list of names may hold; the help says them.
        alias: another name of the flag, which the help leaves out.
        metavar: what stands for the value in the help.
        at_least, at_most: the smallest and the largest number that it may be; the help says them.
        path: it names a file or folder: ``~`` is expanded, and it may not be empty.
        size: it is a number of bytes (:func:`parse_size`).
        excludes: options that cannot be given beside it.
    """
    about = {
        "help": text,
        "group": group,
        "choices": choices,
        "names": names,
        "alias": alias,
        "metavar": metavar,
        "range": (at_least, at_most),
        "path": path,
        "size": size,
        "excludes": excludes,
    }
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Options:
    """The base of all options.

    Raises:
        HalfbyteError: a value is none of those that an option may have, or two options exclude each other.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str):
                object.__setattr__(self, item.name, _checked_text(item, value))
            if value == item.default:
                continue
            choices = choices_of(item)
            if choices and value not in choices:
                raise HalfbyteError(f"--{item.name}: unknown value, expected one of {', '.join(choices)}, got {value}")
            _check_range(item, value)
            if item.metadata["size"]:
                parse_size(value, f"--{item.name}")
            for other in item.metadata["excludes"]:
                if getattr(self, other) != self.__dataclass_fields__[other].default:
                    raise HalfbyteError(f"--{item.name}, --{other}: one excludes the other", fix="leave one out")


def _checked_text(item: Field[Any], value: str) -> str:
    """A text that the system can hold; of a path, with ``~`` expanded."""
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise HalfbyteError(f"--{item.name}: not a text, got NUL or bytes that are no UTF-8 in {value!r}")
    return checked_path(value, f"--{item.name}") if item.metadata["path"] else value


def checked_path(value: str, where: str) -> str:
    """A path with ``~`` expanded.

    Raises:
        HalfbyteError: it is empty, no system can hold it, or the home folder is not known.
    """
    if not value.strip():
        raise HalfbyteError(f"{where}: expected the name of a file or folder, got an empty one")
    found = os.path.expanduser(value)
    if found.startswith("~"):
        raise HalfbyteError(f"{where}: no user has this home folder, got {value}")
    longest = max(len(part.encode()) for part in PurePath(found).parts or (found,))
    if longest > LONGEST_NAME or len(found.encode()) > LONGEST_PATH:
        raise HalfbyteError(
            f"{where}: name is too long, expected at most {LONGEST_NAME} bytes and {LONGEST_PATH} with its folders, "
            f"got {value[:40]}…"
        )
    return found


def parse_size(text: str, where: str) -> int:
    """``4.36GiB``, ``700MB`` or plain bytes, in bytes.

    Raises:
        HalfbyteError: not a size, or none at all.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    found = int(float(match[1]) * unit) if match and unit else 0
    if not found:
        raise HalfbyteError(f"{where}: not a size, expected such as 4.36GiB, 700MB or bytes, got {text}")
    return found


def _check_range(item: Field[Any], value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    least, most = item.metadata["range"]
    inside = (least is None or value >= least) and (most is None or value <= most)
    if not (math.isfinite(value) and inside):
        raise HalfbyteError(f"--{item.name}: out of range, expected {range_of(item) or 'a number'}, got {value}")


def range_of(item: Field[Any]) -> str:
    """What numbers an option may be, in words; empty if any will do."""
    least, most = item.metadata["range"]
    if least is None:
        return "" if most is None else f"at most {most:,}"
    return f"{least:,} or more" if most is None else f"{least:,} to {most:,}"


Kind = TypeVar("Kind", bound=Options)


def choices_of(item: Field[Any]) -> tuple[str, ...]:
    """The values that an option may have; empty if any will do."""
    choices = item.metadata["choices"]
    return choices if isinstance(choices, tuple) else choices()


def help_of(item: Field[Any]) -> str:
    """The help text of an option, with the names that a list may hold, or the range of a number."""
    names, allowed = item.metadata["names"], range_of(item)
    return item.metadata["help"] + (f"; names: {', '.join(names())}" if names else f"; {allowed}" if allowed else "")


def in_groups(options: type[Options]) -> dict[str, list[Field[Any]]]:
    """The options of one command by group, those of the command itself before those it shares with others."""
    own = [item for item in fields(options) if item.name in options.__annotations__]
    shared = [item for item in fields(options) if item.name not in options.__annotations__]
    found = {group: [item for item in (*own, *shared) if item.metadata["group"] == group] for group in GROUPS}
    return {group: items for group, items in found.items() if items}


def options_of(kind: type[Kind], given: Mapping[str, Any], *, where: str) -> Kind:
    """Options from the keyword arguments of a library function.

    Args:
        where: the function, for messages.

    Raises:
        HalfbyteError: an unknown name, or a value of another type or that is not allowed.
    """
    known = {item.name: item for item in fields(kind) if item.name not in OF_COMMANDS}
    values = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    for name, value in values.items():
        if name not in known:
            raise HalfbyteError(f"{where}: unknown option {name}, expected one of {', '.join(sorted(known))}")
        wanted = _type_of(known[name])
        allowed = (float, int) if wanted is float else (wanted,)
        if not isinstance(value, allowed) and (value is not None or known[name].default is not None):
            got = f"{type(value).__name__} {value!r}"
            raise HalfbyteError(f"{where}: {name} is of another type, expected {wanted.__name__}, got {got}")
    return kind(**values)


def _type_of(item: Field[Any]) -> type:
    return str if item.default is None else type(item.default)


def add_arguments(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """One flag per option, by group."""
    for group, items in in_groups(options).items():
        target = parser.add_argument_group(group) if group else parser
        for item in items:
            _add_flag(target, item)


def _add_flag(parser: argparse._ActionsContainer, item: Field[Any]) -> None:
    text = help_of(item) + ("" if item.default in (None, "", False, True) else f" (default: {item.default})")
    text = text.replace("%", "%%")
    if isinstance(item.default, bool):
        action = argparse.BooleanOptionalAction if item.default else "store_true"
        parser.add_argument(f"--{item.name}", action=action, default=item.default, help=text)
        return
    settings: dict[str, Any] = {
        "type": _type_of(item),
        "choices": choices_of(item) or None,
        "metavar": item.metadata["metavar"],
    }
    parser.add_argument(f"--{item.name}", default=item.default, help=text, **settings)
    if item.metadata["alias"]:
        hidden = {"dest": item.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(f"--{item.metadata['alias']}", **hidden, **settings)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise HalfbyteError(message, fix=f"see {self.prog} --help")


def parse(options: type[Kind], arguments: Sequence[str], *, prog: str | None, about: str) -> Kind:
    """Parse ``arguments`` into an options dataclass.

    Raises:
        HalfbyteError: an unknown flag, or a value that an option may not have.
    """
    parser = _Parser(prog=prog, description=about)
    add_arguments(parser, options)
    return options(**vars(parser.parse_args(arguments)))
