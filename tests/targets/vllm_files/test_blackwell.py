"""NVFP4 folders: transformers says what the search scored, and vLLM's fused layers find one global scale."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import cli
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.layers import layers_of
from halfbyte.options import SearchOptions
from halfbyte.plan import codes_path, load_codes
from halfbyte.quant.grids import E2M1
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.targets import TARGETS
from halfbyte.targets.vllm_files.blackwell import Blackwell, exact_e4m3
from halfbyte.targets.vllm_files.compressed import logits_in_transformers
from tests.targets.plans import PLAN, plan_for
from tests.tiny_models import logits_of, some_ids

EXPORT = ["--config", PLAN, "--output", "out"]
SAME = 1e-4  # largest difference of logits over the largest logit
FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blackwell(hardware="blackwell", parallel=1):
    return TARGETS["vllm"].on(hardware, parallel)


def stored(folder):
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"transforms": "none", "weights": "rtn"}),
        ("qwen2", {"transforms": "smooth,r1,r2"}),
        ("qwen2-tied", {"transforms": "smooth"}),
    ],
)
def test_transformers_says_what_the_search_scored(family, options, tiny_folder, here):
    source, plan = plan_for(tiny_folder(family), hardware="blackwell", a_bits=(4, 16), **options)
    assert {entry.a_bits for entry in plan.layers.values()} == {4, 16}
    assert {entry.group_size for entry in plan.layers.values()} == {16}
    assert cli.run("export vllm", [*EXPORT, "--json", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["difference"] <= SAME
    ids = some_ids(source)
    ours, theirs = logits_of(source.model, ids), logits_in_transformers(Path("out"), ids[None])[0]
    assert float((ours - theirs).abs().max() / ours.abs().max()) <= SAME


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    """A plan of a tiny Qwen2, its codes, and the folder as vLLM gets it."""
    at = tmp_path_factory.mktemp("exported")
    _, plan = plan_for(tiny_folder("qwen2"), at / PLAN, hardware="blackwell", a_bits=(4, 16), weights="rtn")
    assert cli.run("export vllm", ["--config", str(at / PLAN), "--output", str(at / "out"), "--no-check"]) == 0
    return plan, load_codes(codes_path(at / PLAN)), at / "out"


def test_layers_that_vllm_fuses_share_their_global_scales(exported):
    """Among them an input scale for A4 alone, and weights that stand for what was simulated."""
    plan, codes, folder = exported
    tensors = stored(folder)
    for name, entry in plan.layers.items():
        parts = next(
            ([name.replace(own, part) for part in names] for names in FUSED for own in names if own in name), [name]
        )
        globals_ = {float(tensors[f"{part}.weight_global_scale"]) for part in parts}
        assert len(globals_) == 1
        (factor,) = globals_
        assert math.frexp(factor)[0] == 0.5
        scales = tensors[f"{name}.weight_scale"].float() / factor
        values = Blackwell(100).unpack(tensors[f"{name}.weight_packed"]) / 2
        decoded = values * scales.repeat_interleave(16, dim=1)
        assert torch.equal(decoded, codes.weights[name].decode())
        inputs = tensors.get(f"{name}.input_global_scale")
        assert (inputs is None) == (entry.a_bits == 16)
        if inputs is not None:
            assert {float(tensors[f"{part}.input_global_scale"]) for part in parts} == {entry.a_scale}
            assert entry.a_scale > 0


def test_the_config_is_one_that_vllm_takes(exported):
    """As its ``_is_nvfp4_format`` and ``_get_scheme_from_parts`` ask for."""
    plan, _, folder = exported
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["quantization_status"]) == ("nvfp4-pack-quantized", "compressed")
    named = {}
    for group in config["config_groups"].values():
        inputs = group.get("input_activations")
        for args in filter(None, (group["weights"], inputs)):
            found = {key: args[key] for key in ("strategy", "type", "num_bits", "group_size", "symmetric")}
            expected = {"strategy": "tensor_group", "type": "float", "num_bits": 4, "group_size": 16, "symmetric": True}
            assert found == expected
        assert inputs is None or inputs["dynamic"] == "local"
        named |= dict.fromkeys(group["targets"], 16 if inputs is None else 4)
    assert named == {name: entry.a_bits for name, entry in plan.layers.items()}


def test_integer_codes_are_refused(exported):
    _, codes, _ = exported
    name, weight = next(iter(codes.weights.items()))
    with pytest.raises(HalfbyteError, match=f"{name}: codes are not NVFP4.*--hardware blackwell"):
        exact_e4m3(round_to_nearest(weight.decode(), 16).pack(), 0, name)
    with pytest.raises(HalfbyteError, match="codes are not NVFP4"):
        exact_e4m3(weight, 20, name)
    assert weight.grid is E2M1


@pytest.mark.parametrize("name", ["blackwell", "sm100", "sm103", "sm110", "sm120", "sm121"])
def test_every_blackwell_gpu_has_this_target(name):
    target = blackwell(name)
    assert isinstance(target, Blackwell)
    assert target.hardware == ("sm100" if name == "blackwell" else name)


def test_groups_of_another_size_are_refused():
    options = SearchOptions(model_id="m", target="vllm", hardware="blackwell")
    blackwell().check_options(options)
    assert blackwell().recipe_for(options).group_size == 16
    with pytest.raises(HalfbyteError, match="--group_size: NVFP4 has weights in groups of 16, got 64"):
        blackwell().check_options(replace(options, group_size=64))


def test_rotations_stay_within_heads():
    """R1 mixes all channels, which groups of 16 keep apart; it is still there for those who ask."""
    options = SearchOptions(model_id="m", target="vllm", hardware="blackwell")
    for tied in (False, True):
        assert blackwell().transforms(options, tied=tied) == ("smooth", "r2")
    assert blackwell().transforms(replace(options, transforms="r1"), tied=False) == ("r1",)


def test_inputs_that_are_no_whole_groups_on_a_gpu_are_refused(tiny):
    source = tiny("llama")
    layers, options = layers_of(source.model, source.family), SearchOptions(model_id="m", target="vllm")
    blackwell(parallel=4).check_model(source, layers, options, {})
    with pytest.raises(HalfbyteError, match=r"attention heads, expected a divisor of 4, got 3"):
        blackwell(parallel=3).check_model(source, layers, options, {})
    odd = tiny("llama", intermediate_size=264)
    with pytest.raises(HalfbyteError, match=r"layers\.0\.down: NVFP4 needs whole groups of 16 inputs.*got 264"):
        blackwell().check_model(odd, layers_of(odd.model, odd.family), options, {})
