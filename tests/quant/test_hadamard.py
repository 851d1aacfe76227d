"""Rotations: Hadamard matrices of every order that models need, and their fast product."""

from __future__ import annotations

import math

import pytest
import torch

from halfbyte.quant.hadamard import (
    factors,
    hadamard_matrix,
    largest_block,
    rotate,
    rotate_back,
    rotate_blocks,
    rotation_matrix,
    signs,
)

WIDTHS = [576, 896, 1536, 3584, 4864, 8960, 11008, 18944]
COSINE = [11008, 43]  # their odd part, 43, has no small Hadamard matrix


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 256, 12, 20, 28, 36, 76, 140, 148])
def test_hadamard_matrices(order):
    matrix = hadamard_matrix(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 35, 92])  # 92 exists, but not by Paley's constructions
def test_orders_without_a_construction(order):
    assert hadamard_matrix(order) is None


@pytest.mark.parametrize("width", [*WIDTHS, 43, 1])
def test_lengths_and_angles_are_kept(width):
    rows = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    turned = rotate(rows)
    expected, got = rows.double() @ rows.double().T, turned.double() @ turned.double().T
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-6
    assert math.prod(len(part) for part in factors(width)) == width
    for part in factors(width):
        part = part.double()
        assert float((part @ part.T - torch.eye(len(part), dtype=torch.float64)).abs().max()) < 1e-6


@pytest.mark.parametrize("width", [*WIDTHS, 43, 1])
def test_back_again(width):
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate_back(rotate(x)), x, atol=1e-5)


@pytest.mark.parametrize("width", [*WIDTHS, 43])
def test_one_channel_reaches_all_others_evenly(width):
    spread = rotate(torch.eye(3, width)).abs() * math.sqrt(width)
    if width in COSINE:
        assert float(spread.max()) < math.sqrt(2) + 1e-4
    else:
        assert torch.allclose(spread, torch.ones_like(spread), atol=1e-4)


@pytest.mark.parametrize("width", [32, 43, 128, 576])
def test_the_matrix_is_the_same_rotation(width):
    matrix = rotation_matrix(width)
    assert float((matrix @ matrix.T - torch.eye(width, dtype=torch.float64)).abs().max()) < 1e-6
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    assert rotate(x).shape == x.shape
    assert torch.allclose(rotate(x).double(), x.double() @ matrix.T, atol=1e-5)
    assert torch.allclose(rotate(rotate(x)).double(), x.double() @ (matrix @ matrix).T, atol=1e-5)


def test_a_constant_is_spread_too():
    """Without signs it would end up in one channel."""
    assert float(rotate(torch.ones(1, 576)).abs().max()) < 6


def test_signs_never_change():
    """Plans hold weights that were stored for these."""
    assert signs(576)[:16].tolist() == [1, 1, -1, 1, 1, 1, 1, -1, 1, 1, 1, -1, 1, -1, -1, 1]
    assert signs(43)[:8].tolist() == [1, 1, -1, -1, -1, 1, 1, 1]
    assert torch.equal(signs(576).abs(), torch.ones(576))


def test_the_product_never_changes():
    """The same promise for factors and their order."""
    assert [len(part) for part in factors(576)] == [36, 16]
    assert [len(part) for part in factors(18944)] == [148, 16, 8]
    assert [len(part) for part in factors(11008)] == [43, 16, 16]
    found = rotate(torch.eye(576)[[1, 200]])[:, [0, 7, 300, 575]].sign()
    assert found.tolist() == [[1, -1, 1, -1], [-1, -1, -1, -1]]


@pytest.mark.parametrize(("width", "block"), [(96, 32), (128, 128), (12, 4), (7, 1)])
def test_block_rotations_are_those_of_compressed_tensors(width, block):
    """To the last bit: its transform of type hadamard in front of a layer."""
    from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme, apply_transform_config

    assert largest_block(width) == block
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False))
    layer[0].weight.data = torch.eye(width)
    where = [TransformArgs(targets=["0"], location="input")]
    scheme = TransformScheme(type="hadamard", head_dim=block, apply=where)
    apply_transform_config(layer, TransformConfig(config_groups={"r": scheme}))
    assert torch.equal(rotate_blocks(x, block), layer(x))
    torch.testing.assert_close(rotate_blocks(rotate_blocks(x, block), block), x)
