"""Codes of 4-bit floats: their values, how they are stored, and GPTQ and scales on them."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

from halfbyte.core.errors import HalfbyteError
from halfbyte.plan import Codes, load_codes, save_codes
from halfbyte.quant.arithmetics.nvfp4 import Nvfp4Scales
from halfbyte.quant.grids import E2M1, GRIDS, INT4, e2m1
from halfbyte.quant.int4 import (
    GroupedWeight,
    absmax_scales,
    decode_packed,
    encode_with_scales,
    searched_scales,
)
from halfbyte.quant.quant_linear import SharedInput, replace_linear_
from halfbyte.quant.quantisers.gptq import Ordered, descend_scales, improve_codes, output_error, round_with_feedback
from halfbyte.quant.quantisers.rtn import round_to_nearest
from tests.quant.kernels.interpreter import interpret

RULE = Nvfp4Scales()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def nvfp4(rows=24, columns=96, seed=0):
    return round_to_nearest(torch.randn(rows, columns, generator=generator(seed)), 16, rule=RULE)


def test_every_value_and_every_tie_of_e2m1():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 7.0: 6, 1e9: 6}
    values = {size: size for size in (0, 0.5, 1, 1.5, 2, 3, 4, 6)}
    for given, expected in {**ties, **values}.items():
        assert e2m1(torch.tensor([given, -given])).tolist() == [expected, -expected]


def test_rounding_is_that_of_compressed_tensors():
    x = 4 * torch.randn(4096, generator=generator())
    x = torch.cat([x, torch.arange(-8, 8, 1 / 16)])
    assert torch.equal(e2m1(x), cast_to_fp4(x.clone()).clamp(-6, 6))
    assert torch.equal(E2M1.nearest_(2 * x), 2 * e2m1(x))


def test_nibbles_are_those_of_compressed_tensors():
    codes = torch.tensor([[*sorted(set(E2M1.values)), 0]], dtype=torch.int8)
    weight = GroupedWeight(codes, torch.ones(1, 1, dtype=torch.float16), grid=E2M1)
    packed = weight.pack()
    assert torch.equal(packed.packed, pack_fp4_to_uint8(codes.float() / 2))
    assert torch.equal(unpack_fp4_from_uint8(packed.packed, 1, 16, torch.float32), codes / 2)
    assert torch.equal(packed.unpack().codes, codes)
    assert (packed.unpack().grid, packed.to("cpu").grid) == (E2M1, E2M1)


def test_a_weight_decodes_alike_however_it_is_kept():
    weight = nvfp4()
    expected = weight.decode()
    packed = weight.pack()
    assert torch.equal(packed.decode(), expected)
    assert torch.equal(decode_packed(packed.packed, packed.scales, torch.float32, grid=E2M1), expected)
    x = torch.randn(3, 96, generator=generator(1), requires_grad=True)
    for kept in (False, True):
        holder = torch.nn.Module()
        holder.linear = torch.nn.Linear(96, 24, bias=False)
        replace_linear_(holder, "linear", packed, SharedInput(), packed=kept)
        assert torch.equal(holder.linear.weight, expected)
        answer = holder.linear(x)
        assert torch.allclose(answer, x @ expected.T, atol=1e-5)
        (slope,) = torch.autograd.grad(answer.sum(), x)
        assert torch.allclose(slope, expected.sum(0).expand_as(x), atol=1e-5)


def test_a_codes_file_remembers_the_grid(tmp_path):
    weights = {"a": nvfp4(seed=1).pack(), "b": round_to_nearest(torch.randn(4, 32), 32).pack()}
    save_codes(tmp_path / "c.safetensors", Codes(weights, {"norm.weight": torch.ones(3)}, {}))
    found = load_codes(tmp_path / "c.safetensors")
    assert {name: weight.grid for name, weight in found.weights.items()} == {"a": E2M1, "b": INT4}
    assert torch.equal(found.weights["a"].decode(), weights["a"].decode())
    assert set(found.parameters) == {"norm.weight"}


def test_scales_of_the_largest_weight_take_it_to_the_largest_code():
    weight = torch.zeros(1, 32)
    weight[0, 3], weight[0, 20], weight[0, 21] = 0.75, -3.0, 1.0
    encoded = round_to_nearest(weight, 16, rule=RULE)
    assert encoded.scales.tolist() == [[0.0625, 0.25]]
    assert encoded.codes[0, [3, 20, 21]].tolist() == [12, -12, 4]


def test_searched_scales_lose_less_and_may_leave_the_largest_code_unused():
    weight = torch.randn(64, 256, generator=generator())
    importance = torch.rand(256, generator=generator(1)) + 0.1

    def loss(scales):
        error = encode_with_scales(weight, scales, grid=E2M1).decode() - weight
        return float((error.square() * importance).sum())

    plain, searched = absmax_scales(weight, 16, rule=RULE), searched_scales(weight, 16, importance, rule=RULE)
    assert loss(searched) < 0.85 * loss(plain)
    assert bool((searched > 1.2 * plain).any())
    assert bool((searched < plain).any())


def correlated(rows=48, columns=96):
    x = torch.randn(512, columns, generator=generator(2)) @ torch.randn(columns, columns, generator=generator(3))
    return torch.randn(rows, columns, generator=generator(4)), x.T @ x / len(x)


def test_gptq_on_the_grid_beats_rounding():
    weight, hessian = correlated()
    known = Ordered(hessian.clone())
    known.factorise(0.01)
    scales = absmax_scales(weight, 16, rule=RULE)
    rounded = encode_with_scales(weight, scales, grid=E2M1)
    fed_back = round_with_feedback(weight, scales, known, E2M1)
    improved = improve_codes(weight, fed_back, known)
    errors = [output_error(weight, encoded, hessian) for encoded in (rounded, fed_back, improved)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] <= errors[1]
    assert set(improved.codes.flatten().tolist()) <= set(E2M1.values)
    assert improved.grid is E2M1


def test_grids_are_found_by_their_names():
    assert GRIDS == {"int4": INT4, "e2m1": E2M1}
    assert (INT4.top, INT4.even, E2M1.top, E2M1.even) == (7, True, 12, False)
    with pytest.raises(HalfbyteError, match="odd number"):
        GroupedWeight(torch.zeros(1, 3, dtype=torch.int8), torch.ones(1, 1), grid=E2M1).pack()


def test_the_triton_twin_decodes_to_the_same_bits():
    interpret("""
import torch
from halfbyte.quant.grids import E2M1
from halfbyte.quant.int4 import PackedWeight
from halfbyte.quant.kernels.triton_kernels import decode_packed
packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
scales = torch.rand(8, 4).half()
out = torch.empty(8, 64)
assert torch.equal(decode_packed(packed, scales, out, E2M1), PackedWeight(packed, scales, E2M1).decode())
""")


def test_scales_chosen_one_by_one_never_lose():
    weight, hessian = correlated()
    known = Ordered(hessian.clone())
    known.factorise(0.01)
    known_loss = []
    encoded = round_with_feedback(weight, absmax_scales(weight, 16, rule=RULE), known, E2M1)
    for improved in (encoded, descend_scales(weight, encoded, known, RULE)):
        known_loss.append(output_error(weight, improved, hessian + known.added * torch.eye(len(hessian))))
    assert known_loss[1] < 0.999 * known_loss[0]
    assert torch.equal(RULE.fitted(improved.scales, known=encoded.scales), improved.scales)
    assert torch.equal(improved.codes, encoded.codes)
