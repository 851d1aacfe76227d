"""Layers of a model, and units: layers that share one choice. Imports no torch: the search sees numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.models.families import Family

if TYPE_CHECKING:
    from torch import nn


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
class Outcome:
    """One row of the outcome table: what was asked for a layer and what was done."""

    layer: str
    asked: str
    done: str
    note: str = ""


def mean_bits_fraction(units: Sequence[Unit], bits: Sequence[int]) -> float:
    """Mean activation bits / 8 over units, weighted by multiply-accumulates (the budget's measure)."""
    total = sum(unit.macs for unit in units)
    return sum(unit.macs * b for unit, b in zip(units, bits, strict=True)) / (8 * total)


def layers_of(model: nn.Module, family: Family) -> list[Layer]:
    """Every linear layer inside the blocks, in model order."""
    found = []
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        for part in family.linears:
            module: Any = block.get_submodule(part)  # an nn.Linear or a QuantLinear
            name = f"{family.blocks}.{index}.{part}"
            found.append(Layer(name, index, part.rpartition(".")[2], module.in_features, module.out_features))
    return found


def units_of(layers: Sequence[Layer], family: Family, granularity: str) -> list[Unit]:
    """Group layers into units: ``fused`` (shared input tensor) or ``layer`` (each alone)."""
    if granularity == "layer":
        return [Unit(layer.name, layer.block, (layer,)) for layer in layers]
    by_name = {layer.name: layer for layer in layers}
    units = []
    for block in sorted({layer.block for layer in layers}):
        for group in family.groups:
            members = tuple(by_name[f"{family.blocks}.{block}.{part}"] for part in group)
            label = "+".join(layer.kind.removesuffix("_proj") for layer in members)
            units.append(Unit(f"{family.blocks}.{block}.{label}", block, members))
    return units
