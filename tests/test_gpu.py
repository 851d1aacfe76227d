"""The same numbers on a CUDA device. Run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from halfbyte import cli
from halfbyte.models.layers import layers_of, units_of
from halfbyte.plan import load_plan
from halfbyte.prepare import tune
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import load_prepared_, prepare_, save_prepared
from halfbyte.quant.affine import fake_quantise, fake_quantise_rows
from halfbyte.quant.ggml.block_scales import choose_rows
from halfbyte.quant.ggml.grid import GRIDS
from halfbyte.quant.ggml.types import QUANTISED, decode_tensor, row_bytes
from halfbyte.quant.hadamard import rotate
from halfbyte.quant.int4 import decode_packed, searched_scales
from halfbyte.quant.kernels import forced
from halfbyte.quant.quant_linear import InputScheme, SharedInput, replace_linear_, set_activation_bits_
from halfbyte.quant.quantisers.gptq import Ordered, improve_codes, output_error, round_with_feedback
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.reference import reference
from halfbyte.workdir import Workdir
from tests.quant.test_affine import DTYPES, batch, same_bits
from tests.quant.test_int4 import SHAPES, packed_weight

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
    recipe = Recipe(("smooth", "r2", "online", "learned"), "gptq")
    tokens = torch.randint(800, (4, 64), generator=torch.Generator().manual_seed(0))
    source, fresh = copy.deepcopy(tiny("qwen2-tied")), copy.deepcopy(tiny("qwen2-tied"))
    workdir = Workdir(tmp_path / "plan.pt", {}, resume=False)
    made = prepare_(source, tokens, recipe, device=torch.device("cuda"))
    save_prepared(workdir, made)
    load_prepared_(fresh, workdir, recipe, device=torch.device("cuda"))
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
        genomes = [(1,) * len(units), (0,) * len(units), (0, 1) * (len(units) // 2)]  # A8, A4, mixed
        scores[device] = [evaluator.score(genome) for genome in genomes]
        fresh, other = (KLEvaluator(model, family, units, tokens, known) for _ in range(2))
        assert (fresh.losses(genomes[::-1])[::-1] == evaluator.losses(genomes)).all()
        assert next(other.one_at_a_time()) == evaluator.score((0,) + (1,) * (len(units) - 1))
    assert scores["cuda"] == pytest.approx(scores["cpu"], rel=0.02 if dtype == torch.float32 else 0.1)


def test_a_bf16_model_has_no_distance_to_itself(tiny):
    model = copy.deepcopy(tiny("qwen2").model).to("cuda", torch.bfloat16)
    family = tiny("qwen2").family
    tokens = torch.randint(tiny("qwen2").config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    known = reference(model, family, tokens, device=torch.device("cuda"))
    evaluator = KLEvaluator(model, family, [], tokens, known)
    assert abs(evaluator.score(())) < 2e-5


@pytest.mark.parametrize("family", ["qwen2", "llama-tied"])
def test_types_on_the_device(tiny_folder, tmp_path, monkeypatch, family):
    """Packed and decoded candidates make the same plan; with R1 where there is a head of its own."""
    monkeypatch.chdir(tmp_path)
    folder = str(tiny_folder(family))
    arguments = ["--model_id", folder, "--device", "cuda", *QUICK, "--ga_gen", "3", "--spaces", "types"]
    for codes in ("packed", "decoded"):
        chosen = ["--transforms", "smooth,rotate", "--codes", codes, "--output", f"{codes}.json"]
        assert cli.run("search", [*arguments, *chosen]) == 0
    packed, decoded = (load_plan(f"{codes}.json") for codes in ("packed", "decoded"))
    assert packed.file == decoded.file
    assert packed.tensors == decoded.tensors
    assert cli.run("search", [*arguments, "--codes", "packed", "--output", "auto.json"]) == 0
    assert len(load_plan("auto.json").file["transforms_tried"]) == (8 if family == "qwen2" else 4)
    pytest.importorskip("xllamacpp")
    assert cli.run("export", ["--config", "packed.json", "--output", "m.gguf"]) == 0


@pytest.mark.parametrize("type_name", QUANTISED)
def test_rows_are_decoded_alike_without_waiting(type_name):
    rows = torch.randint(0, 256, (64, row_bytes(2048, type_name)), generator=torch.Generator().manual_seed(0))
    rows = rows.to(torch.uint8)
    expected, here = decode_tensor(rows, type_name, torch.bfloat16), rows.cuda()
    decode_tensor(here, type_name)  # tables go to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = decode_tensor(here, type_name, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu().nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("type_name", GRIDS)
def test_scales_of_types_are_as_good(type_name):
    generator = torch.Generator().manual_seed(0)
    weight, cost = torch.randn(64, 2048, generator=generator), torch.rand(2048, generator=generator)
    host, device = choose_rows(weight, type_name, cost), choose_rows(weight.cuda(), type_name, cost.cuda()).cpu()
    missed = [(cost * (decode_tensor(rows, type_name) - weight).square()).sum() for rows in (host, device)]
    assert float(missed[1] / missed[0]) == pytest.approx(1, abs=1e-3)


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


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_kind_are_rounded_alike(dtype, symmetric):
    for width in (1, 33, 896, 5000):
        x, bits = batch(width, dtype)
        for widths in (bits, 12 - bits, 4, 8):
            here = fake_quantise_rows(x, widths, a4_clip=0.85, symmetric=symmetric)
            there = widths if isinstance(widths, int) else widths.cuda()
            for name in ("torch", "triton"):
                with forced(name):
                    got = fake_quantise_rows(x.cuda(), there, a4_clip=0.85, symmetric=symmetric)
                assert same_bits(got.cpu(), here), (name, width, widths)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.85])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 64, 18944), (4, 64, 3584), (6, 896)])
def test_rows_of_real_sizes_are_rounded_alike(shape, dtype, clip, symmetric):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator).exp()
    x = x.to("cuda", dtype)
    mixed = torch.tensor([4, 8, 8, 4, 4, 8][: shape[0]], dtype=torch.int32, device="cuda")
    for bits in (mixed, 4, 8):
        found = []
        for name in ("torch", "triton"):
            with forced(name):
                found.append(fake_quantise_rows(x, bits, a4_clip=clip, symmetric=symmetric))
        assert same_bits(*found)
        assert same_bits(found[1], fake_quantise_rows(x, bits, a4_clip=clip, symmetric=symmetric))  # by default


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad):
    x = torch.ones(2, 5000, device="cuda", dtype=torch.bfloat16)
    x[0, 4999] = bad
    for symmetric in (False, True):
        result = fake_quantise_rows(x, 4, symmetric=symmetric)
        assert not bool(result[0].isfinite().all())
        assert bool(result[1].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3584, 18944, 148), (4864, 896, 7)], ids=str)
def test_packed_codes_are_decoded_alike(shape, dtype):
    packed, scales = (tensor.cuda() for tensor in packed_weight(*shape))
    found = []
    for name in ("torch", "triton"):
        with forced(name):
            buffer = torch.full(shape[:2], torch.nan, dtype=dtype, device="cuda")
            found.append(decode_packed(packed, scales, dtype, out=buffer))
    assert same_bits(*found)
    assert same_bits(found[0].cpu(), decode_packed(packed.cpu(), scales.cpu(), dtype))


def test_a_plan_in_bf16_is_tuned(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "RATE", 5e-3)  # as tests/test_tune.py has it
    monkeypatch.setattr(tune, "BATCH_TOKENS", 256)
    arguments = ["--model_id", str(tiny_folder("qwen2")), "--target", "sim", "--device", "cuda", "--dtype", "bf16"]
    assert cli.run("search", [*arguments, *QUICK, "--tune", "24", "--output", str(tmp_path / "plan.json")]) == 0
    assert load_plan(tmp_path / "plan.json").search["refinement"]["what"] == "tuned"
