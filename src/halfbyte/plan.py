"""The plan: what was chosen for every layer and how, and the files that hold it."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from annotated_types import Ge, Interval
from pydantic import AfterValidator

from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.files import sha256, whole_file
from halfbyte.core.registry import known_names
from halfbyte.core.schema import NOTHING_ELSE, parsed

if TYPE_CHECKING:
    import torch

    from halfbyte.quant.balance import LowRank
    from halfbyte.quant.grids import Grid
    from halfbyte.quant.int4 import PackedWeight

PLAN_VERSION = 2
ADOPTED = "from "  # begins the name of a plan's weights where they are the codes of a checkpoint
WIDTHS = (4, 8, 16)  # of weights and of activations, in bits


def _one_of(value: int) -> int:
    if value not in WIDTHS:
        raise ValueError("expected 4, 8 or 16 bits")
    return value


Width: TypeAlias = Annotated[int, AfterValidator(_one_of)]
Positive: TypeAlias = Annotated[int, Interval(ge=1, le=2**31)]
Count: TypeAlias = Annotated[int, Interval(ge=0, le=2**31 - 1)]
Finite: TypeAlias = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
Share: TypeAlias = Annotated[float, Interval(gt=0, le=1)]


@dataclass(frozen=True)
class LayerPlan:
    """The choice for one layer, and what came of it.

    Attributes:
        w_bits: weight bits.
        a_bits: activation bits; 16 is not rounded.
        group_size: weight group size that was really used.
        a_symmetric: activations quantised symmetrically.
        a4_clip: share of a token's range that 4-bit activation codes span; 8-bit codes always span all of it.
        rotated: the input is rotated at run time, and the weights are stored for that.
        rank: of the low-rank part of the transform of the input at run time; 0 if there is none.
        rotation_block: channels that are rotated together; 0 if the rotation is one of all channels.
        arithmetic: what the layer is computed as (:mod:`halfbyte.quant.arithmetics`).
        a_group: channels whose activation codes share a scale; 0 if all of a token's do.
        a_scale: what group scales of activations are multiplied with before they are rounded; 0 if they are not.
        note: empty, or why something differs from what was asked ("group 64: 128 does not divide 576").
    """

    __pydantic_config__ = NOTHING_ELSE

    w_bits: Width
    a_bits: Width
    group_size: Positive
    a_symmetric: bool = False
    note: str = ""
    a4_clip: Share = 1.0
    rotated: bool = False
    rank: Count = 0
    rotation_block: Count = 0
    arithmetic: str = "per_token"
    a_group: Count = 0
    a_scale: Annotated[Finite, Ge(0)] = 0.0


@dataclass(frozen=True)
class Plan:
    """The searched choice, one entry per layer, plus how it was made.

    Attributes:
        model_id: what the model was loaded from.
        fingerprint: identity of the model's weights (see ``halfbyte.models.loading.fingerprint``).
        target: where the plan will run: ``sim``, ``gguf`` or ``vllm``.
        hardware: compute capability of the GPU that it was made for, such as ``sm90``; empty if any will do.
        granularity: ``fused`` or ``layer``.
        layers: layer name -> LayerPlan, in model order.
        budget_asked, budget_reached: mean activation bits / 8, weighted by multiply-accumulates.
        transforms: names of the function-preserving rewrites, in order of application.
        weights: weight quantiser, e.g. ``rtn``, or ``from NAME``: the codes of that checkpoint.
        text: name, split and sha256 of the text the search saw.
        search: algorithm, settings, score of the winner.
        seed: the seed of everything random.
        versions: package versions and device.
        codes_sha256: digest of the codes file beside the plan; empty where no activation bits were searched.
        tensors: matrix -> ggml type, embedding and output head too; empty where no types were searched.
        file: how those were found: transforms, bytes, losses, and the digest of the encoded matrices beside the plan.
    """

    __pydantic_config__ = NOTHING_ELSE

    model_id: str
    fingerprint: str
    target: str
    granularity: str
    layers: Mapping[str, LayerPlan]
    budget_asked: Finite
    budget_reached: Finite
    transforms: tuple[str, ...] = ()
    weights: str = "rtn"
    text: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    seed: Count = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    codes_sha256: str = ""
    version: int = PLAN_VERSION
    tensors: Mapping[str, str] = field(default_factory=dict)
    file: Mapping[str, Any] = field(default_factory=dict)
    hardware: str = ""

    @property
    def hash(self) -> str:
        """First 12 hex digits of the digest of the choice itself: the same plan has the same hash."""
        choice = {name: asdict(entry) for name, entry in self.layers.items()}
        parts = [self.fingerprint, self.codes_sha256, choice]
        if self.tensors:
            parts += [dict(self.tensors), self.file["sha256"]]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers only, so that JSON and ``weights_only=True`` can hold it."""
        plain = asdict(self)
        plain["layers"] = {name: asdict(entry) for name, entry in self.layers.items()}
        plain["transforms"] = list(self.transforms)
        for name in ("text", "search", "versions", "tensors", "file"):
            plain[name] = dict(getattr(self, name))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: object = "plan") -> Plan:
        """The inverse of :meth:`to_dict`.

        Raises:
            HalfbyteError: a key is missing or unknown, a value is of the wrong kind, or the version is newer.
        """
        if not isinstance(data, Mapping) or "layers" not in data:
            raise HalfbyteError(f"{where}: not a halfbyte plan", fix="make one with mixed_precision_ptq.py")
        if data.get("version") != PLAN_VERSION:
            raise HalfbyteError(
                f"{where}: plan version is not readable, expected {PLAN_VERSION}, got {data.get('version')}",
                fix="make the plan again with mixed_precision_ptq.py",
            )
        plan = parsed(cls, data, where=where, fix="run the search again")
        _check_names(plan, where)
        return plan


@dataclass(frozen=True)
class _File:
    """What :attr:`Plan.file` has at least, where types were searched."""

    sha256: str
    transforms: list[str]
    validation: dict[str, float]


def _check_names(plan: Plan, where: object) -> None:
    """Refuse names of things that this version does not know."""
    transforms = list(plan.transforms)
    if plan.tensors:
        transforms += parsed(_File, dict(plan.file), where=f"{where}, file", fix="run the search again").transforms
    weights = [] if plan.weights.startswith(ADOPTED) else [plan.weights]
    for key, names, package in (
        ("target", [plan.target], "halfbyte.targets"),
        ("transforms", transforms, "halfbyte.transforms"),
        ("weights", weights, "halfbyte.quant.quantisers"),
        ("arithmetic", [entry.arithmetic for entry in plan.layers.values()], "halfbyte.quant.arithmetics"),
    ):
        known = known_names(package)
        unknown = [name for name in names if name.replace("_", "-") not in known]
        if unknown:
            raise HalfbyteError(
                f"{where}, {key}: unknown name, expected {', '.join(known)}, got {unknown[0]!r}",
                fix="run the search again",
            )


SUFFIXES = (".pt", ".json")
CHANNEL_SCALES = "|channel_scales"  # after a layer's name, in a codes file


@dataclass(frozen=True)
class Codes:
    """What a codes file holds, on the host. Read from a file it is mapped: pages are read when they are used.

    Attributes:
        weights: layer name -> codes, two to a byte.
        parameters: name -> a parameter that transforms changed.
        low_rank: first layer of a unit -> transform of the unit's input at run time.
        channel_scales: first layer of a unit -> what its input was divided by and its weights multiplied with before
            they were quantised, fp32 ``[in]``. Files of older versions have none.
    """

    weights: dict[str, PackedWeight]
    parameters: dict[str, torch.Tensor]
    low_rank: dict[str, LowRank]
    channel_scales: dict[str, torch.Tensor] = field(default_factory=dict)


def check_suffix(path: Path) -> None:
    """Refuse a plan name that is neither ``.pt`` nor ``.json``."""
    if path.suffix not in SUFFIXES:
        raise HalfbyteError(
            f"{path}: unknown plan format, expected {' or '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}"
        )


def codes_path(path: str | Path) -> Path:
    """Where the codes of the plan at ``path`` are."""
    return Path(path).with_suffix(".safetensors")


def types_path(path: str | Path) -> Path:
    """Where the encoded matrices of the plan at ``path`` are."""
    return Path(path).with_suffix(".types.safetensors")


def plan_files(path: str | Path) -> list[Path]:
    """The files that a plan may consist of."""
    return [Path(path), codes_path(path), types_path(path)]


def save_codes(path: str | Path, codes: Codes) -> None:
    """Write ``codes`` to ``path`` (a ``.safetensors`` name)."""
    from halfbyte.quant.ggml.encoded import save_tensors

    tensors = dict(codes.parameters)
    for name, weight in codes.weights.items():
        tensors |= {f"{name}.{_kind(weight.grid)}": weight.packed, f"{name}.scales": weight.scales}
    for name, transform in codes.low_rank.items():
        tensors |= {f"{name}.basis": transform.basis, f"{name}.gain": transform.gain}
    for name, scales in codes.channel_scales.items():
        tensors[name + CHANNEL_SCALES] = scales
    save_tensors(path, tensors, "halfbyte.codes.v1")


def _kind(grid: Grid) -> str:
    """The last part of the name of a tensor of codes on that grid."""
    return "codes" if grid.even else f"codes_{grid.name}"


def load_codes(path: str | Path) -> Codes:
    """Read a codes file.

    Raises:
        HalfbyteError: the file is missing, truncated or corrupt.
    """
    from halfbyte.quant.balance import LowRank
    from halfbyte.quant.ggml.encoded import open_tensors
    from halfbyte.quant.grids import GRIDS
    from halfbyte.quant.int4 import PackedWeight

    codes, grids = Codes({}, {}, {}), {_kind(grid): grid for grid in GRIDS.values()}
    with open_tensors(path, "codes file", missing="keep it beside the plan, or search again") as handle:
        for name in handle.keys():  # noqa: SIM118 - not a dict
            layer, _, kind = name.rpartition(".")
            if kind in grids:
                packed, scales = handle.get_tensor(name), handle.get_tensor(f"{layer}.scales")
                _check_codes(packed, scales, f"{path}, {layer}")
                codes.weights[layer] = PackedWeight(packed, scales, grids[kind])
            elif name.endswith(".basis"):
                first = name.removesuffix(".basis")
                codes.low_rank[first] = LowRank(handle.get_tensor(name), handle.get_tensor(f"{first}.gain"))
            elif name.endswith(CHANNEL_SCALES):
                codes.channel_scales[name.removesuffix(CHANNEL_SCALES)] = handle.get_tensor(name)
            elif not name.endswith((".scales", ".gain")):
                codes.parameters[name] = handle.get_tensor(name)
    return codes


def _check_codes(packed: torch.Tensor, scales: torch.Tensor, where: str) -> None:
    """Refuse codes and scales that are no weight, and scales that are not finite."""
    import torch

    kinds = (packed.dtype, scales.dtype) == (torch.uint8, torch.float16)
    rows = packed.dim() == scales.dim() == 2 and len(packed) == len(scales) and 0 not in scales.shape
    if not (kinds and rows and 2 * packed.shape[1] % scales.shape[1] == 0):
        raise HalfbyteError(
            f"{where}: codes and scales do not fit, expected uint8 [out, in / 2] and float16 [out, groups], got "
            f"{list(packed.shape)} and {list(scales.shape)}",
            fix="search again",
        )
    if not bool(scales.isfinite().all()):
        raise HalfbyteError(f"{where}: scales are not finite, got NaN or Inf", fix="search again")


def save_plan(path: str | Path, plan: Plan) -> None:
    """Write the plan; the suffix says how (``.pt``: ``torch.save`` of plain values, ``.json``: text)."""
    path = Path(path)
    check_suffix(path)
    with whole_file(path) as partial:
        if path.suffix == ".json":
            partial.write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")
        else:
            import torch

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
        raise HalfbyteError(f"{path}: no such plan", fix="make one with mixed_precision_ptq.py")
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
        else:
            import torch

            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HalfbyteError(f"{path}: refused: the file is damaged or holds code, not only data") from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise HalfbyteError(f"{path}: plan is damaged, got {first_line(error)}", fix="search again") from error
    except OSError as error:
        raise HalfbyteError(f"{path}: cannot be read, got {error.strerror or error}") from error
    plan = Plan.from_dict(data, where=path)
    if with_codes:
        from halfbyte.quant.ggml.encoded import SEPARATOR

        encoded = {SEPARATOR.join(pair) for pair in plan.tensors.items()}
        _check_beside(path, codes_path(path), plan.codes_sha256, set(plan.layers))
        _check_beside(path, types_path(path), plan.file.get("sha256"), encoded)
    return plan


def _check_beside(plan: Path, path: Path, digest: str | None, expected: set[str]) -> None:
    """Refuse codes that belong to another plan, and a plan that has other layers, or other types, than its codes."""
    from halfbyte.quant.ggml.encoded import SEPARATOR, open_tensors
    from halfbyte.quant.grids import GRIDS

    if not digest:
        return
    if not path.is_file():
        raise HalfbyteError(f"{path}: codes file is missing", fix="keep it beside the plan, or search again")
    if sha256(path) != digest:
        raise HalfbyteError(f"{path}: codes file belongs to another plan, or is damaged", fix="search again")
    with open_tensors(path, "codes file", missing="keep it beside the plan, or search again") as handle:
        names = list(handle.keys())
    suffixes = tuple(f".{_kind(grid)}" for grid in GRIDS.values())
    found = {name for name in names if SEPARATOR in name and not name.endswith(CHANNEL_SCALES)}
    found |= {name.rpartition(".")[0] for name in names if name.endswith(suffixes)}
    if different := sorted(found ^ expected):
        raise HalfbyteError(
            f"{plan}: the plan does not fit {path.name}, got {different[0]} in only one of them", fix="search again"
        )
