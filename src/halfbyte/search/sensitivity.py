"""How much each layer suffers from 4-bit activations, measured at its own output.

Both errors are against the unquantised layer on the unquantised input, with W4 weights in both, so the ratio says what
the activation bits alone change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.calibration.blocks import BlockStep
from halfbyte.errors import HalfbyteError
from halfbyte.formats.int_group import GroupedWeight
from halfbyte.models.modules import linear
from halfbyte.numerics.affine import fake_quantise
from halfbyte.spec import Layer, Unit


@dataclass(frozen=True)
class LayerSensitivity:
    """Errors of one layer.

    Attributes:
        layer: its name.
        mse_a4, mse_a8: mean squared error of the output with 4-bit and 8-bit activations, W4 weights in both.
        power: mean square of the unquantised output.
        grad_power: mean squared gradient of the loss at the output (0 when it was not measured).
    """

    layer: str
    mse_a4: float
    mse_a8: float
    power: float
    grad_power: float = 0.0

    @property
    def ratio(self) -> float:
        """``mse_a4 / mse_a8``; 1 when both are zero."""
        return self.mse_a4 / self.mse_a8 if self.mse_a8 > 0 else 1.0


class _Errors:
    """Sums of squared errors of one layer over all tokens."""

    def __init__(self, weight: torch.Tensor, decoded: torch.Tensor, *, symmetric: bool) -> None:
        self.weight, self.decoded, self.symmetric = weight, decoded, symmetric
        self.sums = {4: 0.0, 8: 0.0}
        self.power, self.count = 0.0, 0

    def see(self, x: torch.Tensor) -> None:  # [tokens, in]
        expected = nn.functional.linear(x, self.weight)
        self.power += float(expected.float().square().sum())
        self.count += expected.numel()
        for bits in self.sums:
            got = nn.functional.linear(fake_quantise(x, bits, symmetric=self.symmetric), self.decoded)
            self.sums[bits] += float((got - expected).float().square().sum())


def measure_block(
    step: BlockStep, layers: Mapping[str, Layer], weights: Mapping[str, GroupedWeight], *, symmetric: bool = False
) -> list[LayerSensitivity]:
    """Run one block of the unquantised model and measure each of its linear layers.

    Args:
        step: where :func:`halfbyte.calibration.blocks.walk_blocks` stands.
        layers: path of the linear in the block -> its Layer.
        weights: path of the linear in the block -> its codes.
        symmetric: symmetric activation codes.

    Raises:
        HalfbyteError: an output is not finite; the layer is named.
    """
    errors = {}
    for part in layers:
        weight = linear(step.block, part).weight
        decoded = weights[part].decode().to(weight)
        errors[part] = _Errors(weight, decoded, symmetric=symmetric)
    step.forward({part: error.see for part, error in errors.items()})
    rows = []
    for part, layer in layers.items():
        error = errors[part]
        mse = {bits: total / error.count for bits, total in error.sums.items()}
        row = LayerSensitivity(layer.name, mse[4], mse[8], error.power / error.count)
        if not all(value < float("inf") for value in (row.mse_a4, row.mse_a8, row.power)):
            raise HalfbyteError(
                "activations are not finite", where=layer.name, got="NaN or Inf during calibration",
                fix="compute in fp32 (--dtype fp32) or check the checkpoint",
            )  # fmt: skip
        rows.append(row)
    return rows


def unit_ratios(units: Sequence[Unit], rows: Mapping[str, LayerSensitivity]) -> list[float]:
    """The largest MSE(A4) / MSE(A8) among the layers of each unit."""
    return [max(rows[layer.name].ratio for layer in unit.layers) for unit in units]


def unit_errors(units: Sequence[Unit], rows: Mapping[str, LayerSensitivity], fitness: str) -> list[dict[int, float]]:
    """What each unit adds to the ``mse`` or ``fisher`` fitness with 4-bit and with 8-bit activations.

    ``mse`` weights a layer's MSE by its share of the multiply-accumulates; ``fisher`` by the mean squared gradient of
    the loss at its output times the number of outputs (the diagonal of the empirical Fisher information; cf. Dong et
    al. 2019, HAWQ, arXiv:1905.03696).
    """
    total = sum(unit.macs for unit in units)
    tables = []
    for unit in units:
        table = {4: 0.0, 8: 0.0}
        for layer in unit.layers:
            row = rows[layer.name]
            weight = layer.out_features * row.grad_power if fitness == "fisher" else layer.macs / total
            table[4] += weight * row.mse_a4
            table[8] += weight * row.mse_a8
        tables.append(table)
    return tables
