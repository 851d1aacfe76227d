"""Things that are found by name: one per file of a package, or registered from anywhere."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from halfbyte.core.errors import HalfbyteError

T = TypeVar("T")


def names_in(package: str) -> tuple[str, ...]:
    """The modules of ``package`` that a registry finds there, without importing it."""
    spec = importlib.util.find_spec(package)
    path = spec.submodule_search_locations if spec else None
    found = [info.name for info in pkgutil.iter_modules(path or []) if not info.ispkg]
    return tuple(sorted(_plain(name) for name in found if not name.startswith("_")))


def _plain(name: str) -> str:
    """A name as it is listed: ``-`` for ``_``."""
    return name.replace("_", "-")


_registries: dict[str, Registry[Any]] = {}  # by their package


def known_names(package: str) -> tuple[str, ...]:
    """The names that the registry of ``package`` has, without importing the package if nobody has yet."""
    registry = _registries.get(package)
    return names_in(package) if registry is None else registry.names()


class Registry(Mapping[str, T]):
    """A mapping from names to things of one kind.

    Every module of ``package`` that does not start with an underscore and is no package itself stands for one thing:
    its name is the module's, with ``-`` for ``_`` (both are found), and the thing is the module's ``attribute``. The
    names are known without importing the modules, so that help texts are quick. Others can be added with
    :meth:`register`.

    Args:
        kind: what the things are, for messages ("transform").
        package: dotted name of the package.
        attribute: name of the thing in its module.
    """

    def __init__(self, kind: str, package: str, attribute: str) -> None:
        self.kind, self._package, self._attribute = kind, package, attribute
        self._registered: dict[str, T] = {}
        _registries[package] = self

    def register(self, name: str, thing: T) -> None:
        """Add ``thing``, or put it in the place of the one that had this name."""
        self._registered[_plain(name)] = thing

    def unregister(self, name: str) -> None:
        """Take out what :meth:`register` added."""
        del self._registered[_plain(name)]

    def names(self) -> tuple[str, ...]:
        """All names, those of the package first."""
        return tuple(dict.fromkeys([*names_in(self._package), *self._registered]))

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        if _plain(name) in self._registered:
            return self._registered[_plain(name)]
        module = importlib.import_module(f"{self._package}.{name.replace('-', '_')}")
        return getattr(module, self._attribute)

    def find(self, name: str, *, where: object) -> T:
        """The thing with this name.

        Raises:
            HalfbyteError: there is none; the message lists those that there are.
        """
        if name not in self:
            raise HalfbyteError(f"{where}: unknown {self.kind}, expected one of {', '.join(self.names())}, got {name}")
        return self[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _plain(name) in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())
