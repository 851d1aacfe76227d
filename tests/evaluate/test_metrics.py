"""KL, top-1 and perplexity against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from halfbyte.evaluate.quality import QualityMeter, kl_per_token


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
