"""How much each layer suffers from 4-bit activations, measured at its own output.

Both errors are against the unquantised layer on the unquantised input, with W4 weights in both, so the ratio says what
the activation bits alone change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.models.layers import Unit


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
