"""Codes on fixed scales: what they decode to is what ggml says, and they go in and out unchanged."""

import numpy as np
import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.ggml import codebook as ggml_codebook
from halfbyte.quant.ggml import grid as ggml_grid
from halfbyte.quant.ggml.grid import GRIDS, codes_of, grid_of, has_grid, with_codes
from halfbyte.quant.ggml.types import QUANTISED, bits_per_weight, decode, decode_tensor, encode, row_bytes

CODEBOOKS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
each_type = pytest.mark.parametrize("type_name", GRIDS)


def encoded(type_name: str, kind: str, rows: int = 6, columns: int = 768) -> torch.Tensor:
    """uint8 [rows, row bytes]: encoded weights of many scales, or random bytes where the scales are finite."""
    generator = torch.Generator().manual_seed(5)
    if kind == "weights":
        scale = torch.logspace(-6, 3, rows)[:, None]
        values = torch.randn(rows, columns, generator=generator) * scale + 0.3 * scale
        values[1] = 0.0
        return torch.from_numpy(encode(values, type_name))
    blocks = torch.randint(0, 256, (64 * rows, row_bytes(columns, type_name)), generator=generator).to(torch.uint8)
    finite = np.isfinite(decode(blocks.numpy(), type_name)).all(1)
    assert finite.sum() >= rows
    return blocks[torch.from_numpy(finite)]


def random_codes(like: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, like.shape, generator=torch.Generator().manual_seed(6)).to(torch.uint8)


def test_every_type_without_a_codebook_has_a_grid():
    assert tuple(name for name in QUANTISED if not has_grid(name)) == CODEBOOKS
    assert [GRIDS[name].bits for name in ("Q2_K", "Q3_K", "Q4_1", "Q5_0", "Q6_K", "Q8_0")] == [2, 3, 4, 5, 6, 8]
    assert all(grid.bits < bits_per_weight(name) <= grid.bits + 1 for name, grid in GRIDS.items())
    bits = [bits_per_weight(name) for name in GRIDS]
    assert bits == sorted(bits)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["weights", "bytes"])
@each_type
def test_codes_on_the_grid_are_what_rows_decode_to(type_name, kind):
    blocks = encoded(type_name, kind)
    before = blocks.clone()
    grid, codes, (step, offset) = GRIDS[type_name], codes_of(blocks, type_name), grid_of(blocks, type_name)
    assert torch.equal(with_codes(blocks, type_name, codes), blocks)
    assert step.dtype == offset.dtype == torch.float32
    assert codes.shape == step.shape == offset.shape == (len(blocks), 768)
    others = random_codes(codes, grid.bits)
    for chosen in (codes, others, torch.zeros_like(codes), torch.full_like(codes, 2**grid.bits - 1)):
        changed = with_codes(blocks, type_name, chosen)
        assert torch.equal(codes_of(changed, type_name), chosen)
        assert all(torch.equal(*pair) for pair in zip(grid_of(changed, type_name), (step, offset), strict=True))
        numbers = torch.tensor(grid.table)[chosen.long()].float() if grid.table else chosen.float()
        assert np.array_equal((step * numbers + offset).numpy(), decode(changed.numpy(), type_name))
    assert torch.equal(blocks, before)
    if grid.table:
        assert not offset.any()


@each_type
def test_views_and_no_rows(type_name):
    blocks = encoded(type_name, "weights", rows=8)
    view = torch.cat([blocks, blocks], 1)[::2, : blocks.shape[1]]
    assert torch.equal(codes_of(view, type_name), codes_of(blocks[::2], type_name))
    assert torch.equal(grid_of(view, type_name)[0], grid_of(blocks[::2], type_name)[0])
    assert torch.equal(with_codes(view, type_name, codes_of(view, type_name)), view)
    assert codes_of(blocks[:0], type_name).shape == grid_of(blocks[:0], type_name)[1].shape == (0, 768)
    assert with_codes(blocks[:0], type_name, torch.empty(0, 768, dtype=torch.uint8)).shape == blocks[:0].shape


def test_what_does_not_fit_is_refused():
    blocks = encoded("Q4_K", "weights", rows=2, columns=256)
    codes = codes_of(blocks, "Q4_K")
    with pytest.raises(HalfbyteError, match=r"no grid of codes.*IQ3_S"):
        grid_of(blocks, "IQ3_S")
    with pytest.raises(
        HalfbyteError, match=r"Q4_K: not rows of its blocks, expected uint8 \[rows, a multiple of 144\]"
    ):
        codes_of(blocks[:, :-1], "Q4_K")
    for wrong in (codes[:, :-1], codes.int(), codes[:1]):
        with pytest.raises(HalfbyteError, match=r"Q4_K: codes do not fit the rows, expected torch.uint8 \[2, 256\]"):
            with_codes(blocks, "Q4_K", wrong)
    with pytest.raises(HalfbyteError, match="codes are too large, expected up to 15, got 16"):
        with_codes(blocks, "Q4_K", torch.full_like(codes, 16))


def test_one_block_by_hand():
    block = np.zeros(34, np.uint8)
    block[:2] = np.frombuffer(np.float16(-0.5).tobytes(), np.uint8)
    block[2:5] = np.array([-128, 0, 127], np.int8).view(np.uint8)
    rows = torch.from_numpy(block)[None]
    step, offset = grid_of(rows, "Q8_0")
    assert (step[0, 0], offset[0, 0]) == (-0.5, 64.0)
    assert codes_of(rows, "Q8_0")[0, :4].tolist() == [0, 128, 255, 128]


@pytest.mark.parametrize("type_name", QUANTISED)
def test_tensor_operations_decode_as_ggml_does(type_name):
    """What a GPU runs; in main memory ``decode_tensor`` calls ggml's own code."""
    rows = torch.from_numpy(
        encode(
            torch.randn(8, 512, generator=torch.Generator().manual_seed(0)),
            type_name,
            importance=torch.linspace(1, 3, 512),
        )
    )
    form = ggml_grid if ggml_grid.has_grid(type_name) else ggml_codebook
    assert torch.equal(form.values_of(rows, type_name), decode_tensor(rows, type_name))
