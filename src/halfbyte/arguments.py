"""Options as fields of a dataclass: flags of a command, and keyword arguments of a function of the library."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from halfbyte.core.errors import HalfbyteError

# Groups of ``--help`` and of the option tables; the options of the first, which has no name, matter most.
MAIN, MODEL, WEIGHTS, SEARCH = "", "model and device", "transforms and weights", "search"
TEXT, ENGINE, OUTPUT = "text", "engine", "output"
GROUPS = (MAIN, MODEL, WEIGHTS, SEARCH, TEXT, ENGINE, OUTPUT)

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
) -> Any:
    """A field of an options dataclass.

    Args:
        text: its help.
        group: one of ``GROUPS``.
        choices: allowed values, or what looks them up; empty if any value will do.
        names: looks up what a list of names may hold; the help says them.
        alias: another name of the flag, which the help leaves out.
        metavar: what stands for the value in the help.
    """
    about = {
        "help": text,
        "group": group,
        "choices": choices,
        "names": names,
        "alias": alias,
        "metavar": metavar,
    }
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Options:
    """The base of all options.

    Raises:
        HalfbyteError: a value is none of those that an option may have.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            choices = choices_of(item) if value != item.default else ()
            if choices and value not in choices:
                raise HalfbyteError(f"--{item.name}: unknown value, expected one of {', '.join(choices)}, got {value}")


Kind = TypeVar("Kind", bound=Options)


def choices_of(item: Field[Any]) -> tuple[str, ...]:
    """The values that an option may have; empty if any will do."""
    choices = item.metadata["choices"]
    return choices if isinstance(choices, tuple) else choices()


def help_of(item: Field[Any]) -> str:
    """The help text of an option, with the names that a list may hold."""
    names = item.metadata["names"]
    return item.metadata["help"] + (f"; names: {', '.join(names())}" if names else "")


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
    known = {item.name: item for item in fields(kind) if item.name != "json"}  # only the commands write that
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


def parse(options: type[Kind], arguments: Sequence[str], *, prog: str | None, about: str) -> Kind:
    """Parse ``arguments`` into an options dataclass; wrong flags end the program with exit code 2."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    add_arguments(parser, options)
    return options(**vars(parser.parse_args(arguments)))
