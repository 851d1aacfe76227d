"""Every quantised type: llama.cpp's own bytes, importances of all kinds, and decoding on a device."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from halfbyte.core.errors import HalfbyteError
from halfbyte.engines import xllamacpp
from halfbyte.quant.ggml import types as ggml
from halfbyte.quant.ggml.types import (
    QUANTISED,
    WRITABLE,
    bits_per_weight,
    decode,
    decode_tensor,
    encode,
    fits,
    needs_importance,
    row_bytes,
)

NEED = ("IQ2_XXS", "IQ2_XS")


def made_of(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "normal":
        return normal
    if kind == "heavy tails":
        return 0.02 * normal / torch.randn(rows, columns, generator=generator).abs().clamp(min=0.05)
    if kind == "tiny":
        return 1e-6 * normal
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.05, normal, 0.0)  # sparse


def importance_of(columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).exp().square() * 1e-3


def llamacpp_bytes(values: torch.Tensor, type_name: str, importance: torch.Tensor | None) -> np.ndarray:
    rows, columns = values.shape
    encoded = np.zeros((rows, row_bytes(columns, type_name)), np.uint8)
    weights = importance.numpy() if importance is not None else None
    xllamacpp.load().ggml_quantize_chunk(
        int(GGMLQuantizationType[type_name]),
        values.numpy().ctypes.data,
        encoded.ctypes.data,
        0,
        rows,
        columns,
        weights.ctypes.data if weights is not None else None,
    )
    return encoded


@pytest.mark.skipif(importlib.util.find_spec(xllamacpp.PACKAGE) is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("type_name", QUANTISED)
def test_bytes_are_those_of_llamacpp(type_name):
    for columns in (256, 768, 576, 32):
        if not fits(columns, type_name):
            continue
        for kind in ("normal", "heavy tails", "tiny", "sparse"):
            values = made_of(kind, 8, columns)
            for importance in (importance_of(columns), torch.ones(columns), None):
                if importance is not None or not needs_importance(type_name):
                    expected = llamacpp_bytes(values, type_name, importance)
                    assert np.array_equal(encode(values, type_name, importance=importance), expected), (columns, kind)


def test_types_are_in_order_and_know_what_they_need():
    bits = [bits_per_weight(name) for name in QUANTISED]
    assert bits == sorted(bits)
    assert set(QUANTISED) < set(WRITABLE)
    assert tuple(name for name in WRITABLE if needs_importance(name)) == NEED[::-1]
    assert [fits(576, name) for name in ("Q4_0", "Q4_K", "F16")] == [True, False, True]
    with pytest.raises(HalfbyteError, match="unknown tensor type"):
        fits(256, "Q9_9")


@pytest.mark.parametrize("type_name", ["Q4_K", "IQ2_XXS", "Q5_0"])
def test_chunks_threads_and_shapes_change_nothing(type_name, monkeypatch):
    values, importance = made_of("normal", 24, 512), importance_of(512)
    whole = encode(values, type_name, importance=importance)
    assert whole.shape == (24, row_bytes(512, type_name))
    monkeypatch.setattr(ggml, "ENCODE_ELEMENTS", 512 * 5)
    assert np.array_equal(encode(values, type_name, importance=importance), whole)
    shaped = encode(values.view(2, 3, 4, 512).double(), type_name, importance=importance.double())
    assert shaped.shape == (2, 3, 4, whole.shape[1])
    assert np.array_equal(shaped.reshape(24, -1), whole)
    assert np.array_equal(encode(values[7], type_name, importance=importance), whole[7])
    assert encode(values[:0], type_name, importance=importance).shape == (0, whole.shape[1])


@pytest.mark.parametrize("type_name", QUANTISED)
def test_the_scale_of_an_importance_does_not_matter(type_name):
    values, importance = made_of("normal", 4, 256), importance_of(256).double()
    expected = encode(values, type_name, importance=importance)
    for exponent in (-120, -31, 8, 100):
        assert np.array_equal(encode(values, type_name, importance=importance * 2.0**exponent), expected)
    zeros = encode(values, type_name, importance=torch.zeros(256))
    assert np.array_equal(zeros, encode(values, type_name, importance=torch.ones(256)))


@pytest.mark.parametrize("type_name", QUANTISED)
def test_channels_of_no_importance_are_still_encoded(type_name):
    values, importance = made_of("normal", 16, 1024), importance_of(1024)
    importance[:256] = importance[300:332] = importance[600:767] = 0.0  # a block, a group, and all but one of a block
    live = torch.rand(1024, generator=torch.Generator().manual_seed(3)) * importance
    plain = decode(encode(values, type_name, importance=torch.ones(1024)), type_name) - values.numpy()
    for weights in (importance, live, torch.full((1024,), 3e38).where(importance > 0, importance)):
        error = decode(encode(values, type_name, importance=weights), type_name) - values.numpy()
        assert np.square(error[:, :600]).mean() < 2.5 * np.square(plain[:, :600]).mean()
        assert np.isfinite(error).all()
    for scale in (1e-7, 1e4):  # ends of what fp16 scales hold
        encoded = encode(values.clamp(-6, 6) * scale, type_name, importance=importance)
        assert np.isfinite(decode(encoded, type_name)).all()


def test_an_importance_that_cannot_be_used_is_refused():
    values = made_of("normal", 2, 256)
    for wrong, message in (
        (torch.ones(255), "importance does not fit.*expected 256 values"),
        (torch.ones(1, 256), "importance does not fit"),
        (torch.ones(256).index_fill(0, torch.tensor([3]), float("nan")), "importance is not finite or is negative"),
        (torch.ones(256).index_fill(0, torch.tensor([3]), float("inf")), "importance is not finite or is negative"),
        (torch.ones(256).index_fill(0, torch.tensor([3]), -1e-9), "importance is not finite or is negative"),
    ):
        with pytest.raises(HalfbyteError, match=f"^up_proj: {message}"):
            encode(values, "Q4_K", importance=wrong, where="up_proj")
    for type_name in NEED:
        with pytest.raises(HalfbyteError, match=f"up_proj: {type_name} needs an importance.*; calibrate"):
            encode(values, type_name, where="up_proj")
    values[1, 7] = float("nan")
    with pytest.raises(HalfbyteError, match="do not fit Q4_K"):
        encode(values, "Q4_K")


def test_threads_may_meet_at_the_first_use_of_a_type():
    code = (
        "import torch; from concurrent.futures import ThreadPoolExecutor as P\n"
        "from halfbyte.quant.ggml.types import encode\n"
        "x, one = torch.randn(4, 256), torch.ones(256)\n"
        "made = P(8).map(lambda _: encode(x, 'IQ2_XS', importance=one).tobytes(), range(32))\n"
        "assert len(set(made)) == 1"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("type_name", WRITABLE)
def test_decoding_on_a_device_is_decoding(type_name, monkeypatch):
    monkeypatch.setattr(ggml, "DECODE_ELEMENTS", 768 * 3)
    values = made_of("normal", 8, 768)
    encoded = encode(values, type_name, importance=importance_of(768))
    blocks = torch.from_numpy(encoded.view(np.uint8).reshape(8, -1))
    decoded = decode_tensor(blocks, type_name)
    assert decoded.dtype == torch.float32
    assert np.array_equal(decoded.numpy(), decode(encoded, type_name))
    assert torch.equal(decode_tensor(blocks, type_name, torch.bfloat16), decoded.bfloat16())
    assert decode_tensor(blocks[:0], type_name).shape == (0, 768)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("type_name", QUANTISED)
def test_any_bytes_decode_alike(type_name):
    blocks = torch.randint(0, 256, (6, row_bytes(512, type_name)), generator=torch.Generator().manual_seed(4))
    blocks = blocks.to(torch.uint8)
    expected = decode(blocks.numpy(), type_name)
    assert np.array_equal(decode_tensor(blocks, type_name).numpy(), expected, equal_nan=True)


def test_blocks_are_checked():
    for wrong in (torch.zeros(2, 143, dtype=torch.uint8), torch.zeros(144, dtype=torch.uint8), torch.zeros(2, 144)):
        with pytest.raises(
            HalfbyteError, match=r"Q4_K: not rows of its blocks, expected uint8 \[rows, a multiple of 144\]"
        ):
            decode_tensor(wrong, "Q4_K")
