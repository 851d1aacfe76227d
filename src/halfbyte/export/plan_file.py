"""A plan on disk: ``NAME.pt`` or ``NAME.json`` with the choice, and ``NAME.safetensors`` beside it with the W4 codes.

``NAME.types.safetensors`` holds the matrices of a GGUF file as they were encoded (:mod:`halfbyte.formats.encoded`).

The codes file holds, per layer, ``LAYER.codes`` (two int4 codes per byte) and ``LAYER.scales`` (fp16); per unit with a
low-rank input transform ``LAYER.basis`` and ``LAYER.gain`` under its first layer's name; and under their own names the
parameters that transforms changed (norms, biases, a rotated embedding). Export and simulation read these numbers;
nothing is quantised twice.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.errors import HalfbyteError, first_line
from halfbyte.files import sha256, whole_file
from halfbyte.formats.encoded import save_tensors
from halfbyte.formats.int_group import PackedWeight
from halfbyte.numerics.balance import LowRank
from halfbyte.spec import Plan

SUFFIXES = (".pt", ".json")


@dataclass(frozen=True)
class Codes:
    """What a codes file holds, on the host. Read from a file it is mapped: pages are read when they are used.

    Attributes:
        weights: layer name -> codes, two to a byte.
        parameters: name -> a parameter that transforms changed.
        low_rank: first layer of a unit -> transform of the unit's input at run time.
    """

    weights: dict[str, PackedWeight]
    parameters: dict[str, torch.Tensor]
    low_rank: dict[str, LowRank]


def check_suffix(path: Path) -> None:
    """Refuse a plan name that is neither ``.pt`` nor ``.json``."""
    if path.suffix not in SUFFIXES:
        raise HalfbyteError(
            "unknown plan format", where=path, expected=" or ".join(SUFFIXES), got=path.suffix or "no suffix"
        )


def codes_path(path: str | Path) -> Path:
    """Where the codes of the plan at ``path`` are."""
    return Path(path).with_suffix(".safetensors")


def types_path(path: str | Path) -> Path:
    """Where the encoded matrices of the plan at ``path`` are."""
    return Path(path).with_suffix(".types.safetensors")


def save_codes(path: str | Path, codes: Codes) -> str:
    """Write ``codes`` to ``path`` (a ``.safetensors`` name); returns the file's sha256."""
    tensors = dict(codes.parameters)
    for name, weight in codes.weights.items():
        tensors |= {f"{name}.codes": weight.packed, f"{name}.scales": weight.scales}
    for name, transform in codes.low_rank.items():
        tensors |= {f"{name}.basis": transform.basis, f"{name}.gain": transform.gain}
    save_tensors(path, tensors, "halfbyte.codes.v1")
    return sha256(path)


def load_codes(path: str | Path) -> Codes:
    """Read a codes file.

    Raises:
        HalfbyteError: the file is missing, truncated or corrupt.
    """
    codes = Codes({}, {}, {})
    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if name.endswith(".codes"):
                    layer = name.removesuffix(".codes")
                    scales = handle.get_tensor(f"{layer}.scales")
                    codes.weights[layer] = PackedWeight(handle.get_tensor(name), scales)
                elif name.endswith(".basis"):
                    first = name.removesuffix(".basis")
                    codes.low_rank[first] = LowRank(handle.get_tensor(name), handle.get_tensor(f"{first}.gain"))
                elif not name.endswith((".scales", ".gain")):
                    codes.parameters[name] = handle.get_tensor(name)
    except FileNotFoundError as error:
        raise HalfbyteError(
            "codes file is missing", where=path, fix="keep it beside the plan, or search again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise HalfbyteError(
            "codes file is truncated or corrupt", where=path, got=first_line(error), fix="search again"
        ) from error
    return codes


def save_plan(path: str | Path, plan: Plan) -> None:
    """Write the plan; the suffix says how (``.pt``: ``torch.save`` of plain values, ``.json``: text)."""
    path = Path(path)
    check_suffix(path)
    with whole_file(path) as partial:
        if path.suffix == ".json":
            partial.write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")
        else:
            torch.save(plan.to_dict(), partial)


def load_plan(path: str | Path, *, with_codes: bool = True) -> Plan:
    """Read a plan; ``with_codes`` also checks that the codes file beside it is the one it was made with.

    ``.pt`` files are loaded with ``weights_only=True``: they cannot run code.

    Raises:
        HalfbyteError: missing, damaged, malicious, of another version, or its codes belong to another plan.
    """
    path = Path(path)
    check_suffix(path)
    if not path.is_file():
        raise HalfbyteError("no such plan", where=path, fix="make one with mixed_precision_ptq.py")
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HalfbyteError("refused: the file is damaged or holds code, not only data", where=path) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise HalfbyteError("plan is damaged", where=path, got=first_line(error), fix="search again") from error
    except OSError as error:
        raise HalfbyteError("cannot be read", where=path, got=error.strerror or error) from error
    plan = Plan.from_dict(data, where=path)
    if with_codes:
        for digest, beside in ((plan.codes_sha256, codes_path(path)), (plan.file.get("sha256"), types_path(path))):
            if digest:
                _check_beside(beside, digest)
    return plan


def _check_beside(path: Path, digest: str) -> None:
    if not path.is_file():
        raise HalfbyteError("codes file is missing", where=path, fix="keep it beside the plan, or search again")
    if sha256(path) != digest:
        raise HalfbyteError("codes file belongs to another plan, or is damaged", where=path, fix="search again")
