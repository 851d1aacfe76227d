"""Rows of the comparison, with a process that only pretends to measure."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFWriter

from halfbyte.core.files import f16_gguf
from halfbyte.evaluate import compare
from halfbyte.evaluate.worker import Measured, OriginalRequest
from halfbyte.options import CompareOptions

CTX, VOCAB = 16, 20


def pretend(request) -> Measured:
    """Uniform answers about one window."""
    np.zeros((CTX // 2 - 1, VOCAB), dtype=np.float32).tofile(request.logits_file)
    original = isinstance(request, OriginalRequest)
    return Measured(
        engine="transformers" if original else "llama.cpp",
        bytes=1,
        load_seconds=1.0,
        peak_memory=1,
        windows=[list(range(CTX))],
        vocab=VOCAB,
        logits_file=request.logits_file,
        generation_tokens_per_second=30.0 if original else 10.0,
        fingerprint="this model" if original else None,
    )


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "measure_apart", pretend)
    f16_gguf("some/model").parent.mkdir()

    def run() -> dict[str, compare.CompareRow]:
        options = CompareOptions(model_id="some/model", text="pydoc", ctx=CTX, chunks=1)
        return {row.name: row for row in compare.compare(options).rows}

    return run


def write_f16(fingerprint: str) -> None:
    writer = GGUFWriter(f16_gguf("some/model"), "llama")
    writer.add_string("halfbyte.fingerprint", fingerprint)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_original_in_llama_cpp_is_the_reference(rows):
    write_f16("this model")
    found = rows()
    assert found["original, F16 GGUF"].quality.ppl == pytest.approx(VOCAB)
    assert found["original, F16 GGUF"].quality.kld_mean is None
    assert found["original"].quality.kld_mean == pytest.approx(0)
    assert found["original"].speed_up == pytest.approx(3)
    assert "no file" in found["mixed"].missing


@pytest.mark.parametrize("content", ["another model", b"GGUF and then nonsense"])
def test_a_foreign_f16_file_is_neither_used_nor_replaced(content, rows):
    path = f16_gguf("some/model")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_f16(content)
    before = path.read_bytes()
    found = rows()
    assert "move it away" in found["original, F16 GGUF"].missing
    assert found["original"].measured
    assert found["original"].speed_up is None
    assert path.read_bytes() == before
