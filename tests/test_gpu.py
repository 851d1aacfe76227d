"""The same numbers on a CUDA device. Run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from halfbyte import cli
from halfbyte.export.plan_file import load_plan
from halfbyte.models.loading import layers_of, units_of
from halfbyte.models.surgery import SharedInput, replace_linear_
from halfbyte.numerics.affine import fake_quantise
from halfbyte.search.evaluator import KLEvaluator, reference
from halfbyte.weights.rtn import round_to_nearest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
QUICK = ["--calib", "pydoc", "--ctx", "64", "--calib_tokens", "128", "--search_tokens", "128", "--ga_pop", "6"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_quantisation_is_bit_identical(symmetric, bits, dtype):
    x = torch.randn(64, 896, generator=torch.Generator().manual_seed(0)).to(dtype)
    here = fake_quantise(x, bits, symmetric=symmetric)
    assert torch.equal(fake_quantise(x.cuda(), bits, symmetric=symmetric).cpu(), here)


def test_codes_are_bit_identical():
    weight = torch.randn(64, 896, generator=torch.Generator().manual_seed(0))
    here, there = round_to_nearest(weight, 128), round_to_nearest(weight.cuda(), 128)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scales, there.scales.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_pure_and_near_those_of_the_cpu(tiny, dtype):
    scores = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(tiny("qwen2").model).to(device, dtype if device == "cuda" else torch.float32)
        family = tiny("qwen2").family
        tokens = torch.randint(tiny("qwen2").config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
        known = reference(model, family, tokens)
        layers = layers_of(model, family)
        units = units_of(layers, family, "fused")
        shared = SharedInput()
        for layer in layers:
            replace_linear_(model, layer.name, round_to_nearest(model.get_submodule(layer.name).weight, 32), shared)
        evaluator = KLEvaluator(model, family, units, tokens, known)
        genomes = [[8] * len(units), [4] * len(units), [4, 8] * (len(units) // 2)]
        scores[device] = [evaluator.score(genome) for genome in genomes]
        assert [evaluator.score(genome) for genome in reversed(genomes)] == scores[device][::-1]
        assert next(evaluator.one_at_a_time(8, 4)) == evaluator.score([4] + [8] * (len(units) - 1))
    assert scores["cuda"] == pytest.approx(scores["cpu"], rel=0.02 if dtype == torch.float32 else 0.1)


def test_a_bf16_model_has_no_distance_to_itself(tiny):
    model = copy.deepcopy(tiny("qwen2").model).to("cuda", torch.bfloat16)
    family = tiny("qwen2").family
    tokens = torch.randint(tiny("qwen2").config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    evaluator = KLEvaluator(model, family, [], tokens, reference(model, family, tokens))
    assert abs(evaluator.score([])) < 2e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_search_on_the_device_is_exported_from_the_host(tiny_folder, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    folder = str(tiny_folder("qwen2"))
    arguments = ["--model_id", folder, "--device", "cuda", "--dtype", dtype, *QUICK, "--ga_gen", "3"]
    assert cli.run("search", arguments) == 0
    assert load_plan("mixed_precision_config.pt").versions["device"] == torch.cuda.get_device_name()
    assert cli.run("export", ["--output", "m.gguf", "--json", "export.json"]) == 0
    assert json.loads(Path("export.json").read_text())["kl"] < 0.05
    assert cli.run("simulate", ["--text", "pydoc", "--ctx", "64", "--chunks", "2", "--max_tokens", "4"]) == 0
