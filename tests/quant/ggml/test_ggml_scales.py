"""Scales go into blocks as they come out of them."""

import numpy as np
import pytest
import torch

from halfbyte.quant.ggml.grid import GRIDS, codes_of, grid_of, with_codes
from halfbyte.quant.ggml.scales import ONE, SCALINGS, Multiples, blocks_with
from halfbyte.quant.ggml.types import decode, row_bytes


def drawn(scaling, blocks=200):
    """Scales of every number that the type can hold."""
    generator = torch.Generator().manual_seed(3)
    low, high = scaling.numbers

    def multiples(low):
        unit = torch.randn(blocks, 1, generator=generator).half().float()
        return Multiples(unit, torch.randint(low, high + 1, (blocks, scaling.groups), generator=generator).float())

    return multiples(low), None if scaling.minimum_at is None else multiples(low)


def test_every_type_with_a_grid_has_scales():
    assert set(SCALINGS) == set(GRIDS)


@pytest.mark.parametrize("type_name", GRIDS)
def test_blocks_hold_the_scales_that_were_given(type_name):
    scaling, grid = SCALINGS[type_name], GRIDS[type_name]
    steps, minima = drawn(scaling)
    blocks = blocks_with(type_name, steps, minima)
    assert blocks.shape == (200, grid.sizes[1])
    assert blocks.shape[1] == row_bytes(grid.sizes[0], type_name)
    step, offset = grid_of(blocks, type_name)
    each = grid.sizes[0] // scaling.groups
    assert torch.equal(step, steps.values.repeat_interleave(each, 1))
    lowest = -grid.centre * steps.values if minima is None else -minima.values
    if grid.table is None:
        assert torch.equal(offset, lowest.repeat_interleave(each, 1))
    codes = torch.randint(0, 2**grid.bits, step.shape, generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    rows = with_codes(blocks, type_name, codes)
    assert torch.equal(codes_of(rows, type_name), codes)
    numbers = torch.tensor(grid.table)[codes.long()].float() if grid.table else codes.float()
    assert np.array_equal((step * numbers + offset).numpy(), decode(rows.numpy(), type_name))


def test_a_block_with_one_step_has_no_numbers():
    assert [name for name, scaling in SCALINGS.items() if scaling.numbers == ONE] == [
        name for name, grid in GRIDS.items() if grid.sizes[0] == 32
    ]
