"""How much each layer suffers from its fewest activation bits, measured at its own output.

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
        mse_low, mse_high: mean squared error of the output with the fewest and the most activation bits that it may get
            (A4 and A8 for most targets), W4 weights in both.
        power: mean square of the unquantised output.
        grad_power: mean squared gradient of the loss at the output (0 when it was not measured).
    """

    layer: str
    mse_low: float
    mse_high: float
    power: float
    grad_power: float = 0.0

    @property
    def ratio(self) -> float:
        """``mse_low / mse_high``; 1 when both are zero."""
        return self.mse_low / self.mse_high if self.mse_high > 0 else 1.0


def unit_ratios(units: Sequence[Unit], rows: Mapping[str, LayerSensitivity]) -> list[float]:
    """The largest ratio of both errors among the layers of each unit."""
    return [max(rows[layer.name].ratio for layer in unit.layers) for unit in units]


def unit_errors(units: Sequence[Unit], rows: Mapping[str, LayerSensitivity], fitness: str) -> list[tuple[float, float]]:
    """What each unit adds to the ``mse`` or ``fisher`` fitness with the fewest and with the most activation bits.

    ``mse`` weights a layer's MSE by its share of the multiply-accumulates; ``fisher`` by the mean squared gradient of
    the loss at its output times the number of outputs (the diagonal of the empirical Fisher information; cf. Dong et
    al. 2019, HAWQ, arXiv:1905.03696).
    """
    total = sum(unit.macs for unit in units)
    tables = []
    for unit in units:
        low = high = 0.0
        for layer in unit.layers:
            row = rows[layer.name]
            weight = layer.out_features * row.grad_power if fitness == "fisher" else layer.macs / total
            low += weight * row.mse_low
            high += weight * row.mse_high
        tables.append((low, high))
    return tables
