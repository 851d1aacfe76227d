"""How many activation bits: how much each layer suffers from the fewest, and the choice as a problem.

A layer's errors are measured at its own output. Both are against the unquantised layer on the unquantised input, with
W4 weights in both, so the ratio says what the activation bits alone change. What an error costs the whole model, the
loss gradient at the output says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import Layer, Unit
from halfbyte.search.problem import Genome, Problem, check_values

RULE_THRESHOLD = 2.5  # MSE(A4) / MSE(A8) above which a unit keeps the larger format
RULE_EDGE_THRESHOLD = 1.5  # the same for units of the first and the last block
BUDGET_EPSILON = 1e-12  # relative: 0.7 is not a binary fraction, and a genome that meets it exactly must fit


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


def activation_problem(
    macs: Sequence[int], budget_fraction: float, gains: Sequence[float], menus: Sequence[Sequence[int]] | None = None
) -> Problem:
    """The choice of an activation width for each unit.

    Args:
        macs: multiply-accumulates per token of each unit.
        budget_fraction: largest allowed mean of bits / 8, weighted by ``macs``.
        gains: what each unit gains by its last width over its first (KL saved); a negative one counts as 0.
        menus: the widths that each unit may have, one or two, ascending; 4 and 8 by default.

    Raises:
        HalfbyteError: the budget is outside what the widths can reach, a gain is not finite, or the numbers of
            units differ.
    """
    menus = [(4, 8)] * len(macs) if menus is None else menus
    costs = tuple(tuple(int(count) * bits for bits in menu) for count, menu in zip(macs, menus, strict=True))
    per_eighth = 8 * sum(int(count) for count in macs)
    low, high = (sum(menu[end] for menu in costs) / per_eighth for end in (0, -1))
    if not low * (1 - BUDGET_EPSILON) <= budget_fraction <= high * (1 + BUDGET_EPSILON):
        ends = [
            f"all A{menus[0][end]}" if len({menu[end] for menu in menus}) == 1 else "as far as the shapes allow"
            for end in (0, -1)
        ]
        raise HalfbyteError(
            f"target_compression: budget is out of range, expected {low:g} ({ends[0]}) to {high:g} ({ends[1]}), "
            f"got {budget_fraction:g}"
        )
    if not all(math.isfinite(gain) for gain in gains):
        raise HalfbyteError("gains: a gain is not finite", fix="look at the sensitivities")
    budget = math.floor(budget_fraction * per_eighth * (1 + BUDGET_EPSILON))
    losses = [(max(gain, 0.0), 0.0)[-len(menu) :] for gain, menu in zip(gains, menus, strict=False)]
    return Problem(costs, tuple(losses), budget)


def rule_genome(problem: Problem, ratios: Sequence[float], edges: Sequence[bool]) -> Genome:
    """The sensitivity rule: the last format for units that lose much at the first, whatever the budget says.

    ``problem.repair`` makes the genome feasible.

    Args:
        ratios: MSE at the first format / MSE at the last, per unit (A4 against A8).
        edges: True for units of the first and the last block.

    Raises:
        HalfbyteError: not one ratio and one edge per unit, or a ratio is NaN.
    """
    check_values(ratios, problem.size, "ratios")
    check_values(edges, problem.size, "edges")
    limits = [RULE_EDGE_THRESHOLD if edge else RULE_THRESHOLD for edge in edges]
    return tuple(top if ratio > limit else 0 for top, ratio, limit in zip(problem.dearest, ratios, limits, strict=True))


def output_gradient_power(
    model: nn.Module, layers: Sequence[Layer], tokens: torch.Tensor
) -> Iterator[dict[str, float]]:
    """After each window of ``tokens`` ``[windows, length]``, yield layer name -> mean squared gradient so far.

    It is that of the language-model loss at the layer's output: the diagonal of the empirical Fisher information.
    The loss is the mean next-token cross-entropy of the window, scaled by its length: the gradient of one token's loss.
    Only activations carry gradients; no parameter does.
    """
    sums = dict.fromkeys((layer.name for layer in layers), 0.0)
    handles = []
    for layer in layers:

        def hook(_: nn.Module, __: tuple, output: torch.Tensor, name: str = layer.name) -> None:
            def see(gradient: torch.Tensor) -> None:
                sums[name] += float(gradient.float().square().mean())

            output.register_hook(see)

        handles.append(model.get_submodule(layer.name).register_forward_hook(hook))
    device = next(model.parameters()).device
    embed = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    try:
        for done, window in enumerate(tokens, start=1):
            ids = window.unsqueeze(0).to(device)
            embedded = embed(ids).detach().requires_grad_(True)
            with torch.enable_grad():
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
                nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()
            yield {name: total / done for name, total in sums.items()}
    finally:
        for handle in handles:
            handle.remove()
