"""int4 packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.int4 import pack_int4, unpack_int4


@given(
    hnp.arrays(
        "int8", st.tuples(st.integers(1, 8), st.integers(1, 16).map(lambda n: 2 * n)), elements=st.integers(-8, 7)
    )
)
def test_round_trip(codes):
    packed = pack_int4(torch.from_numpy(codes))
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] * 2 == codes.shape[-1]
    assert torch.equal(unpack_int4(packed), torch.from_numpy(codes))


def test_even_element_is_the_low_nibble():
    assert int(pack_int4(torch.tensor([1, -1], dtype=torch.int8))) == 0xF1


@pytest.mark.parametrize("codes", [[1, 2, 3], [8, 0], [-9, 0]])
def test_refuses_what_does_not_fit(codes):
    with pytest.raises(HalfbyteError):
        pack_int4(torch.tensor(codes, dtype=torch.int8))
