"""The same numbers on a CUDA device. Run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from halfbyte import cli
from halfbyte.export.plan_file import load_plan
from halfbyte.kernels.columns import forced
from halfbyte.models.loading import layers_of, units_of
from halfbyte.models.surgery import InputScheme, SharedInput, replace_linear_, set_activation_bits_
from halfbyte.numerics.affine import fake_quantise
from halfbyte.numerics.hadamard import rotate
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import load_prepared_, prepare_, save_prepared
from halfbyte.progress import silent
from halfbyte.search.evaluator import KLEvaluator, reference
from halfbyte.stages import Stages
from halfbyte.weights.gptq import Ordered, improve_codes, output_error, round_with_feedback
from halfbyte.weights.rtn import round_to_nearest
from halfbyte.weights.scales import searched_scales

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


@pytest.mark.parametrize("width", [128, 576])
def test_triton_twins_choose_the_same_codes(width):
    """Sums run in another order, so a code on the edge between two values may differ."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(512, width, generator=generator).cuda()
    x = (torch.randn(4096, width, generator=generator) @ torch.randn(width, width, generator=generator)).cuda()
    hessian = x.T @ x / len(x)
    scales = searched_scales(weight, 64, hessian.diagonal())
    known = Ordered(hessian)
    known.factorise(0.01)
    found = {}
    for name in ("torch", "triton"):
        with forced(name):
            rounded = round_with_feedback(weight, scales, known)
            found[name] = rounded, improve_codes(weight, rounded, known)
    by_default = round_with_feedback(weight, scales, known)
    assert torch.equal(by_default.codes, found["triton"][0].codes)
    for one, other in zip(found["torch"], found["triton"], strict=True):
        assert float((one.codes == other.codes).float().mean()) > 0.999
        errors = [output_error(weight, encoded, hessian) for encoded in (one, other)]
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("width", [576, 11008, 18944])
def test_rotations_are_those_of_the_cpu(width):
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate(x.cuda()).cpu(), rotate(x), atol=1e-4)


def test_what_was_saved_runs_on_the_device(tiny, tmp_path):
    """A resumed search starts from the model that an undisturbed one has."""
    recipe = Recipe(("smooth", "r3", "online", "learned"), "gptq")
    tokens = torch.randint(800, (4, 64), generator=torch.Generator().manual_seed(0))
    source, fresh = copy.deepcopy(tiny("qwen2-tied")), copy.deepcopy(tiny("qwen2-tied"))
    stages = Stages(tmp_path / "plan.pt", {}, resume=False)
    made = prepare_(source, tokens, recipe, silent, device=torch.device("cuda"))
    save_prepared(stages, made)
    load_prepared_(fresh, stages, recipe, device=torch.device("cuda"))
    logits = []
    for known in (source, fresh):
        known.model.to("cuda")
        set_activation_bits_(known.model, dict.fromkeys(made.layers, 4))
        with torch.no_grad():
            logits.append(known.model(tokens.cuda()).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_pure_and_near_those_of_the_cpu(tiny, dtype):
    scores = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(tiny("qwen2").model).to(device, dtype if device == "cuda" else torch.float32)
        family = tiny("qwen2").family
        tokens = torch.randint(tiny("qwen2").config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
        known = reference(model, family, tokens, device=torch.device(device))
        layers = layers_of(model, family)
        units = units_of(layers, family, "fused")
        shared, scheme = SharedInput(), InputScheme()
        for layer in layers:
            coded = round_to_nearest(model.get_submodule(layer.name).weight, 32)
            replace_linear_(model, layer.name, coded, shared, scheme)
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
    known = reference(model, family, tokens, device=torch.device("cuda"))
    evaluator = KLEvaluator(model, family, [], tokens, known)
    assert abs(evaluator.score([])) < 2e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_search_for_the_simulation(tiny_folder, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    folder = str(tiny_folder("qwen2-tied"))
    arguments = ["--model_id", folder, "--device", "cuda", "--dtype", dtype, *QUICK, "--ga_gen", "3"]
    assert cli.run("search", [*arguments, "--target", "sim", "--output", "plan.json"]) == 0
    scores = load_plan("plan.json").search["scores"]
    assert scores["all A8"] < scores["plan"] < scores["all A4"] < 0.5
    quick = ["--text", "pydoc", "--ctx", "64", "--chunks", "2", "--max_tokens", "4", "--config", "plan.json"]
    assert cli.run("simulate", ["--device", "cuda", *quick]) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_search_on_on_the_device_is_exported_from_the_host(tiny_folder, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    folder = str(tiny_folder("qwen2"))
    arguments = ["--model_id", folder, "--device", "cuda", "--dtype", dtype, *QUICK, "--ga_gen", "3"]
    assert cli.run("search", arguments) == 0
    assert load_plan("mixed_precision_config.pt").versions["device"] == torch.cuda.get_device_name()
    assert cli.run("export", ["--output", "m.gguf", "--json", "export.json"]) == 0
    assert json.loads(Path("export.json").read_text())["kl"] < 0.05
    assert cli.run("simulate", ["--text", "pydoc", "--ctx", "64", "--chunks", "2", "--max_tokens", "4"]) == 0
