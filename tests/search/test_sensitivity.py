"""What units make of their layers' errors; loss gradients; the choice of bits, and the rule."""

from __future__ import annotations

import math

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import layers_of, units_of
from halfbyte.search.problem import Problem
from halfbyte.search.sensitivity import (
    LayerSensitivity,
    activation_problem,
    output_gradient_power,
    rule_genome,
    unit_errors,
    unit_ratios,
)


def tokens_for(source, windows=2):
    return torch.randint(source.config.vocab_size, (windows, 24), generator=torch.Generator().manual_seed(0))


def test_units_take_the_largest_ratio_and_the_sum_of_errors(tiny):
    source = tiny("llama")
    layers = layers_of(source.model, source.family)
    units = units_of(layers, source.family, "fused")
    rows = {layer.name: LayerSensitivity(layer.name, 1.0 + index, 1.0, 1.0, 2.0) for index, layer in enumerate(layers)}
    assert unit_ratios(units, rows)[0] == 3.0
    q, k, v = layers[:3]
    table = unit_errors(units, rows, "fisher")[0]
    assert table[0] == 2.0 * (q.out_features * 1 + k.out_features * 2 + v.out_features * 3)
    table = unit_errors(units, rows, "mse")[0]
    assert table[1] == pytest.approx((q.macs + k.macs + v.macs) / sum(layer.macs for layer in layers))


def test_gradient_power_predicts_the_loss(tiny):
    """g² at an output is the squared slope of the loss: compare with a finite difference."""
    source = tiny("llama")
    tokens = tokens_for(source, windows=1)
    layers = layers_of(source.model, source.family)
    power = list(output_gradient_power(source.model, layers, tokens))[-1]
    assert all(value > 0 for value in power.values())

    def loss(name, direction):
        handle = source.model.get_submodule(name).register_forward_hook(lambda _, __, out: out + direction)
        with torch.no_grad():
            logits = source.model(tokens).logits[0, :-1]
        handle.remove()
        return float(torch.nn.functional.cross_entropy(logits.double(), tokens[0, 1:], reduction="sum"))

    name, slopes = "model.layers.1.mlp.down_proj", []
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        direction = 1e-2 * torch.randn(1, 24, 128, generator=generator)
        slopes.append((loss(name, direction) - loss(name, -direction)) / 2e-2)
    # Var(g·ε) = Σ g² for standard normal ε
    measured = sum(slope**2 for slope in slopes) / len(slopes) / (24 * 128)
    assert measured == pytest.approx(power[name], rel=0.6)


def test_an_activation_budget_that_is_no_binary_fraction_is_met_exactly():
    problem = activation_problem((1,) * 10, 0.7, [1.0] * 10)  # 4 of 10 units at 8 bits: (4 * 8 + 6 * 4) / 80
    assert problem.fill((0,) * 10).count(1) == 4
    assert not problem.feasible((1,) * 5 + (0,) * 5)


def test_activation_costs_are_bits_and_negative_gains_count_as_nothing():
    problem = activation_problem([3, 5], 1.5, [-1.0, 2.0], [(8, 16)] * 2)
    assert problem.costs == ((24, 48), (40, 80))
    assert problem.losses == ((0.0, 0.0), (2.0, 0.0))
    assert problem.budget == 96
    single = activation_problem([3, 5], 1.7, [1.0, 2.0], [(8, 16), (16,)])
    assert (single.costs, single.losses) == (((24, 48), (80,)), ((1.0, 0.0), (0.0,)))
    said = r"expected 1.625 \(as far as the shapes allow\) to 2 \(all A16\), got 1.5"
    with pytest.raises(HalfbyteError, match=said):
        activation_problem([3, 5], 1.5, [1.0, 2.0], [(8, 16), (16,)])


@pytest.mark.parametrize("budget", [0.49, 1.01, math.nan])
def test_activation_budgets_out_of_range_are_refused(budget):
    said = r"target_compression: budget is out of range, expected 0.5 \(all A4\) to 1 \(all A8\)"
    with pytest.raises(HalfbyteError, match=said):
        activation_problem([1, 1], budget, [1.0, 1.0])


@pytest.mark.parametrize(("gains", "said"), [([1.0], "losses of 2 units, got 1"), ([1.0, math.nan], "not finite")])
def test_wrong_gains_are_refused(gains, said):
    with pytest.raises(HalfbyteError, match=said):
        activation_problem([1, 1], 0.75, gains)


def test_the_rule_has_its_own_threshold_at_the_edges_and_ignores_the_budget():
    problem = activation_problem((1, 1, 1, 1), 0.5, (1, 1, 1, 1))
    edges = (True, False, False, True)
    assert rule_genome(problem, (2.0, 2.0, 3.0, 1.5), edges) == (1, 0, 1, 0)


def test_the_rule_takes_the_last_format_of_longer_menus():
    problem = Problem(((1, 2, 3), (1, 2)), ((2, 1, 0), (1, 0)), 9)
    assert rule_genome(problem, (3.0, 3.0), (False, False)) == (2, 1)


@pytest.mark.parametrize(
    ("ratios", "edges", "said"),
    [
        ((2.0,), (True, False), "ratios: expected 2 values"),
        ((2.0, 1.0), (True,), "edges: expected 2 values"),
        ((2.0, math.nan), (True, False), "ratios: a value is NaN"),
    ],
)
def test_the_rule_refuses_what_does_not_fit(ratios, edges, said):
    with pytest.raises(HalfbyteError, match=said):
        rule_genome(activation_problem((1, 1), 0.75, (1, 1)), ratios, edges)
