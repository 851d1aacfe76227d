"""Importance-matrix files: as llama.cpp writes them, read back, and refused when they belong elsewhere."""

import struct

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from halfbyte.calibration.imatrix_file import Importance, check_for, read_imatrix, write_imatrix
from halfbyte.core.errors import HalfbyteError

NAMES = ["blk.0.attn_q.weight", "blk.0.ffn_down.weight", "token_embd.weight"]
WIDTHS = dict(zip(NAMES, [64, 96, 64], strict=True))


def some_importance(tokens: int = 1024, changes: dict[str, np.ndarray] | None = None) -> Importance:
    rng = np.random.default_rng(0)
    values = {name: rng.gamma(1.0, size=width).astype(np.float32) for name, width in WIDTHS.items()}
    return Importance({**values, **(changes or {})}, tokens, ("pydoc",), 512)


def write_raw(path, tensors):
    writer = GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    for name, value in tensors.items():
        writer.add_tensor(name, np.asarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tokens", [1024, 1000, 32768 + 77])
def test_round_trip(tmp_path, tokens):
    known = some_importance(tokens)
    write_imatrix(tmp_path / "i.gguf", known)
    found = read_imatrix(tmp_path / "i.gguf")
    assert (found.tokens, found.texts, found.chunk_size) == (tokens, ("pydoc",), 512)
    assert found.chunk_count == tokens // 512
    assert set(found.values) == set(NAMES)
    for name in NAMES:
        assert found.values[name].dtype == np.float32
        if tokens == 1024:
            np.testing.assert_array_equal(found.values[name], known.values[name])
        np.testing.assert_allclose(found.values[name], known.values[name], rtol=2e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_what_llamacpp_looks_for(tmp_path):
    """Keys and types that ``common_imatrix_load`` asks for, by the gguf package's own reader."""
    known = some_importance()
    write_imatrix(tmp_path / "i.gguf", known)
    reader = GGUFReader(tmp_path / "i.gguf")
    keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys["general.type"].contents() == "imatrix"
    assert keys["imatrix.datasets"].contents() == ["pydoc"]
    assert [kind.name for kind in keys["imatrix.datasets"].types] == ["ARRAY", "STRING"]
    for key, expected in (("imatrix.chunk_count", 2), ("imatrix.chunk_size", 512)):
        assert ([kind.name for kind in keys[key].types], keys[key].contents()) == (["UINT32"], expected)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(NAMES)
    for name, width in WIDTHS.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert (sums.tensor_type.name, counts.tensor_type.name) == ("F32", "F32")
        assert ([int(n) for n in sums.shape], [int(n) for n in counts.shape]) == ([width, 1], [1, 1])
        assert float(counts.data.reshape(-1)[0]) == 1024
        np.testing.assert_array_equal(sums.data.reshape(-1) / 1024, known.values[name])


def test_without_a_text_llamacpp_still_finds_its_key(tmp_path):
    write_imatrix(tmp_path / "i.gguf", Importance({NAMES[0]: np.ones(32, np.float32)}, 7))
    assert read_imatrix(tmp_path / "i.gguf").texts == ("unknown",)
    assert read_imatrix(tmp_path / "i.gguf").chunk_count == 7


def test_experts_have_their_own_counts(tmp_path):
    sums = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    write_raw(tmp_path / "i", {"a.in_sum2": sums, "a.counts": np.array([[2], [0], [4]], np.float32)})
    found = read_imatrix(tmp_path / "i")
    np.testing.assert_array_equal(found.values["a"].reshape(3, 4), [sums[0] / 2, np.ones(4), sums[2] / 4])
    assert (found.tokens, found.texts, found.chunk_size) == (4, (), 0)


def dat(entries, tail=b""):
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, len(values))]
        parts.append(np.asarray(values, "<f4").tobytes())
    return b"".join(parts) + tail


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 5, 0), struct.pack("<ii", 5, 4) + b"wiki"])
def test_the_older_format(tmp_path, tail):
    (tmp_path / "i.dat").write_bytes(dat({"a": (5, [5.0, 10.0, 0.0]), "b": (0, [3.0])}, tail))
    found = read_imatrix(tmp_path / "i.dat")
    np.testing.assert_array_equal(found.values["a"], np.array([1, 2, 0], np.float32))
    np.testing.assert_array_equal(found.values["b"], np.array([3], np.float32))
    assert (found.tokens, found.chunk_count) == (5, 5)
    assert "".join(found.texts) == ("wiki" if tail[8:] else "")


def test_another_models_importance_is_refused():
    check_for(some_importance(), WIDTHS)
    check_for(some_importance(), {NAMES[0]: 64})  # more than needed is fine
    with pytest.raises(HalfbyteError, match=r"m\.gguf: .*1 of 3 .*expected 128 values for blk\.0\.ffn_down.*got 96"):
        check_for(some_importance(), {**WIDTHS, NAMES[1]: 128}, where="m.gguf")
    with pytest.raises(HalfbyteError, match=r"2 of 5 .*expected 64 values for blk\.1\.attn_q\.weight, got none; "):
        check_for(some_importance(), {**WIDTHS, "blk.1.attn_q.weight": 64, "blk.1.attn_k.weight": 64})


@pytest.mark.parametrize(("strange", "message"), [(np.nan, "not finite"), (np.inf, "not finite"), (-1.0, "negative")])
def test_strange_values_are_refused(tmp_path, strange, message):
    value = np.ones(64, np.float32)
    value[3] = strange
    with pytest.raises(HalfbyteError, match=f"blk.0.attn_q.weight: .*{message}"):
        some_importance(changes={NAMES[0]: value})
    write_raw(tmp_path / "i", {"a.in_sum2": value.reshape(1, -1), "a.counts": np.ones((1, 1), np.float32)})
    with pytest.raises(HalfbyteError, match=message):
        read_imatrix(tmp_path / "i")


def test_of_no_tokens():
    with pytest.raises(HalfbyteError, match="no tokens"):
        some_importance(tokens=0)


def test_what_is_no_importance_matrix(tmp_path):
    path, ones = tmp_path / "i", np.ones((1, 4), np.float32)
    with pytest.raises(HalfbyteError, match="importance matrix is missing"):
        read_imatrix(path)
    one = np.ones((1, 1), np.float32)
    for tensors in (
        {"a": ones},
        {"a.in_sum2": ones},
        {"a.counts": one},
        {"a.in_sum2": ones, "a.counts": one.astype(np.float16)},
    ):
        write_raw(path, tensors)
        with pytest.raises(HalfbyteError, match="not an importance matrix"):
            read_imatrix(path)
    for counts in (np.full((1, 1), np.nan), np.ones((3, 1))):
        write_raw(path, {"a.in_sum2": ones, "a.counts": counts.astype(np.float32)})
        with pytest.raises(HalfbyteError, match="counts do not fit"):
            read_imatrix(path)
    whole = dat({"a": (5, [5.0, 10.0])}, struct.pack("<ii", 5, 4) + b"wiki")
    for broken in (b"", b"text that is no matrix", whole[:9], whole[:16], whole[:-1], dat({}), b"\xff" * 40):
        path.write_bytes(broken)
        with pytest.raises(HalfbyteError, match="not an importance matrix"):
            read_imatrix(path)
    write_imatrix(path, some_importance())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(HalfbyteError, match="truncated"):
        read_imatrix(path)
