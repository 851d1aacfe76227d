"""Model families, one file each: adding a family is adding a file to this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.families.base import Family

__all__ = ["Family", "families", "family_of"]


@cache
def families() -> dict[str, Family]:
    """Every family by its Hugging Face ``model_type``."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            found[family.model_type] = family
    return found


def family_of(model_type: str, *, where: object = "model") -> Family:
    """The family of a Hugging Face ``model_type``.

    Raises:
        HalfbyteError: no file in this folder describes it.
    """
    known = families()
    if model_type not in known:
        raise HalfbyteError(
            "unknown model family",
            where=where,
            expected="one of " + ", ".join(sorted(known)),
            got=repr(model_type),
            fix="a family is one file in src/halfbyte/models/families",
        )
    return known[model_type]
