"""Frozen values that every part of halfbyte speaks: formats, layers, units, plans, outcomes.

Nothing here computes on tensors, so the search and the reports can import it without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from halfbyte.errors import HalfbyteError

PLAN_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 knew no rotated inputs; what it lacks has defaults
ACTIVATION_BITS = (4, 8)


@dataclass(frozen=True)
class Layer:
    """One linear module.

    Attributes:
        name: dotted module path, e.g. ``model.layers.3.mlp.down_proj``.
        block: index of the transformer block it belongs to.
        kind: the last part of the name, e.g. ``down_proj``.
        in_features, out_features: weight shape is ``[out_features, in_features]``.
    """

    name: str
    block: int
    kind: str
    in_features: int
    out_features: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Unit:
    """Layers that share one choice, because they share one input tensor (``fused``) or by request (``layer``)."""

    name: str
    block: int
    layers: tuple[Layer, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token of all layers in the unit."""
        return sum(layer.macs for layer in self.layers)


@dataclass(frozen=True)
class LayerPlan:
    """The choice for one layer, and what came of it.

    Attributes:
        w_bits: weight bits.
        a_bits: activation bits.
        group_size: weight group size that was really used.
        a_symmetric: activations quantised symmetrically.
        a4_clip: share of a token's range that 4-bit activation codes span; 8-bit codes always span all of it.
        rotated: the input is rotated at run time, and the weights are stored for that.
        rank: of the low-rank part of the transform of the input at run time; 0 if there is none.
        rotation_block: channels that are rotated together; 0 if the rotation is one of all channels.
        note: empty, or why something differs from what was asked ("group 64: 128 does not divide 576").
    """

    w_bits: int
    a_bits: int
    group_size: int
    a_symmetric: bool = False
    note: str = ""
    a4_clip: float = 1.0
    rotated: bool = False
    rank: int = 0
    rotation_block: int = 0


@dataclass(frozen=True)
class Outcome:
    """One row of the outcome table: what was asked for a layer and what was done."""

    layer: str
    asked: str
    done: str
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The searched choice, one entry per layer, plus how it was made.

    Attributes:
        model_id: what the model was loaded from.
        fingerprint: identity of the model's weights (see ``halfbyte.models.loading.fingerprint``).
        target: where the plan will run: ``sim``, ``gguf`` or ``vllm``.
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

    model_id: str
    fingerprint: str
    target: str
    granularity: str
    layers: Mapping[str, LayerPlan]
    budget_asked: float
    budget_reached: float
    transforms: tuple[str, ...] = ()
    weights: str = "rtn"
    text: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    codes_sha256: str = ""
    version: int = PLAN_VERSION
    tensors: Mapping[str, str] = field(default_factory=dict)
    file: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """First 12 hex digits of the digest of the choice itself: the same plan has the same hash."""
        # what older plans do not have: their hashes stay
        later = {"a4_clip": 1.0, "rotated": False, "rank": 0, "rotation_block": 0}
        choice = {
            name: {key: value for key, value in asdict(entry).items() if later.get(key, ...) != value}
            for name, entry in self.layers.items()
        }
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
            raise HalfbyteError("not a halfbyte plan", where=where, fix="make one with mixed_precision_ptq.py")
        if data.get("version") not in READABLE_VERSIONS:
            raise HalfbyteError(
                "plan version is not readable", where=where, expected=PLAN_VERSION, got=data.get("version")
            )
        try:
            layers = {str(name): LayerPlan(**entry) for name, entry in data["layers"].items()}
            rest = {key: value for key, value in data.items() if key not in ("layers", "transforms")}
            plan = cls(layers=layers, transforms=tuple(data.get("transforms", ())), **rest)
        except (TypeError, AttributeError) as error:
            raise HalfbyteError("plan is damaged", where=where, got=error, fix="run the search again") from error
        for name, entry in plan.layers.items():
            if entry.a_bits not in ACTIVATION_BITS:
                raise HalfbyteError(
                    "activation bits out of range", where=f"{where}, {name}", expected="4 or 8", got=entry.a_bits
                )
        return plan


def mean_bits_fraction(units: Sequence[Unit], bits: Sequence[int]) -> float:
    """Mean activation bits / 8 over units, weighted by multiply-accumulates (the budget's measure)."""
    total = sum(unit.macs for unit in units)
    return sum(unit.macs * b for unit, b in zip(units, bits, strict=True)) / (8 * total)
