"""Quality: numbers against their definitions, llama.cpp's method on transformers logits, workers that fail well."""

from __future__ import annotations

import math

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import (
    LogitsFile,
    QualityMeter,
    kl_per_token,
    live,
    measure,
    model_logits,
    sample_text,
    windows_for,
)
from halfbyte.evaluate.worker import Request, measure_apart, run_worker


def test_second_half_is_scored(tiny):
    source = tiny("qwen2")
    window = torch.randint(source.config.vocab_size, (32,), generator=torch.Generator().manual_seed(0))
    logits = model_logits(source.model)(window.tolist())
    whole = source.model(window.unsqueeze(0)).logits[0]
    torch.testing.assert_close(logits, whole[16:31])
    quality = measure([window.tolist()], iter([logits]))
    expected = torch.nn.functional.cross_entropy(whole[16:31], window[17:]).exp()
    assert quality.ppl == pytest.approx(float(expected), rel=1e-5)
    assert quality.tokens == 15


def test_logits_file_keeps_what_it_was_given(tiny, tmp_path):
    source = tiny("llama")
    windows = windows_for(source, "a short text about nothing much. " * 40, 32, 3, where="text")
    logits_of = model_logits(source.model)
    kept = LogitsFile(tmp_path / "logits", source.config.vocab_size, 15)
    kept.write(windows, logits_of, "test")
    quality = measure(windows, live(windows, logits_of), iter(kept))
    assert quality.kld_mean == pytest.approx(0, abs=1e-6)
    assert quality.top1_agreement == 1.0


def test_bos_is_put_in_front_only_where_the_tokenizer_does(tiny):
    text = "some words " * 100
    llama, qwen = tiny("llama"), tiny("qwen2")
    assert windows_for(llama, text, 16, 2, where="t")[1][0] == llama.tokenizer.bos_token_id
    assert windows_for(qwen, text, 16, 1, where="t")[0] == qwen.tokenizer(text).input_ids[:16]


def test_different_vocabularies_are_refused():
    with pytest.raises(HalfbyteError, match="vocabularies differ"):
        measure([list(range(8))], iter([torch.zeros(3, 10)]), iter([torch.zeros(3, 11)]))


def test_sample_text_is_greedy(tiny):
    source = tiny("llama")
    assert sample_text(source, "Hello", 5) == sample_text(source, "Hello", 5)


def test_a_worker_that_crashes_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "crashing_worker.py").write_text("import os, sys; print('last words', file=sys.stderr); os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(HalfbyteError, match=r"model\.gguf: measurement crashed.*last words"):
        run_worker("crashing_worker", {"path": "model.gguf"})


def test_a_worker_hands_on_its_own_error(tmp_path):
    request = Request(
        path=str(tmp_path / "missing.gguf"),
        stage="test",
        texts={"text": str(tmp_path / "text.txt")},
        text_name="text",
        logits_file=str(tmp_path / "logits"),
        ctx=32,
        chunks=1,
    )
    with pytest.raises(HalfbyteError, match=r"missing\.gguf"):
        measure_apart(request)


def test_kl_against_scipy_style_definition():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert float(kl_per_token(p.log(), q.log() + 3.0)) == pytest.approx(expected, rel=1e-5)


def test_a_model_has_no_distance_to_itself():
    logits, targets = torch.randn(20, 50), torch.randint(50, (20,))
    meter = QualityMeter()
    meter.add(logits[:12], targets[:12], logits[:12])
    meter.add(logits[12:], targets[12:], logits[12:])
    quality = meter.result()
    assert quality.kld_mean == pytest.approx(0, abs=1e-6)
    assert quality.top1_agreement == 1.0
    assert quality.tokens == 20
    assert quality.ppl == quality.ppl_reference
    expected = torch.nn.functional.cross_entropy(logits, targets).exp()
    assert quality.ppl == pytest.approx(float(expected), rel=1e-5)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    meter = QualityMeter()
    meter.add(torch.zeros(5, 32), torch.arange(5))
    assert meter.result().ppl == pytest.approx(32, rel=1e-5)
    assert meter.result().kld_mean is None
