"""A folder in vLLM's CPU build, and what that really computed. Opt-in: it needs an environment with vLLM.

python benchmarks/serve_env.py ENV
HALFBYTE_SERVE_PYTHON=ENV/bin/python pytest tests/targets/vllm_files/test_in_vllm.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from halfbyte import cli
from halfbyte.models.loading import find, load
from halfbyte.plan import codes_path, load_codes, load_plan
from halfbyte.prepare.simulation import become_simulation_, plan_bits
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.targets.served.folder import read_served
from halfbyte.targets.served.report import distance, ran_as
from halfbyte.targets.served.rules import in_vllm, this_cpu
from halfbyte.targets.served.twins import TWINS, write_twins
from tests.command_line import ROOT, search
from tests.tiny_models import logits_of, some_ids

PYTHON = os.environ.get("HALFBYTE_SERVE_PYTHON")
NO_KERNEL = "cpu_gemm_wna16"  # what the AVX2 build lacks
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        not PYTHON, reason="HALFBYTE_SERVE_PYTHON names no Python with vLLM; benchmarks/serve_env.py makes one"
    ),
]


def in_environment(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the benchmarks' scripts in the environment with vLLM."""
    command = [str(PYTHON), str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=1200)


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    """A mixed plan of a tiny Llama and its folder, beside its twins."""
    here = tmp_path_factory.mktemp("serve")
    model = tiny_folder("llama")
    old = Path.cwd()
    os.chdir(here)
    try:
        assert search(model, "--target", "vllm", "--target_compression", "0.75") == 0
        assert cli.run("export vllm", ["--output", "folder"]) == 0
    finally:
        os.chdir(old)
    write_twins(read_served(here / "folder"), here / "twins")
    return model, here


@pytest.fixture(scope="module")
def simulated(exported):
    """Log-probabilities of the next tokens in our simulation, by activation bits, and the tokens."""
    model, here = exported
    source = load(find(str(model)), device=torch.device("cpu"), dtype=torch.float32)
    plan = load_plan(here / "mixed_precision_config.pt")
    become_simulation_(source, load_codes(codes_path(here / "mixed_precision_config.pt")), plan.layers)
    ids = some_ids(source, 96)
    found = {}
    for name, bits in {
        "as planned": plan_bits(plan),
        16: dict.fromkeys(plan.layers),
        8: dict.fromkeys(plan.layers, 8),
        4: dict.fromkeys(plan.layers, 4),
    }.items():
        set_activation_bits_(source.model, bits)
        logprobs = logits_of(source.model, ids).log_softmax(-1)
        found[name] = logprobs[:-1].gather(1, ids[1:, None])[:, 0].tolist()
    return found, ids


def test_what_vllm_ran_on_this_cpu(exported, simulated, tmp_path):
    _, here = exported
    found, ids = simulated
    folders = {"folder": here / "folder", **{name: here / "twins" / name for name in TWINS}}
    expected = {
        in_vllm(read_served(here / "folder").stored(layer), this_cpu()).a_bits
        for layer in read_served(here / "folder").layers
    }
    assert len(expected) == 1  # a CPU makes no difference between A4 and A8
    bits = expected.pop()
    asked = ["--ids", ",".join(map(str, ids.tolist())), "--memory_share", "0.1", "--json", str(tmp_path / "a.json")]
    done = in_environment("serve_worker.py", *map(str, folders.values()), *asked, VLLM_CPU_KVCACHE_SPACE="1")
    if not bits:  # a CPU without AVX-512: loads, then has no kernel, as doctor says
        assert done.returncode
        assert NO_KERNEL in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "a.json").read_text())
    assert "Using CPUWNA16LinearKernel for mixed-precision linear" in written["kernels"]
    answers = {name: written["answers"][str(path)]["logprobs"] for name, path in folders.items()}
    verdict = ran_as(answers.pop("folder"), answers)
    assert verdict.alike == tuple(TWINS), verdict  # the groups' activation bits change nothing
    ran = answers["w4a16"]
    near, far = distance(ran, found[bits]), distance(ran, found["as planned"])
    assert near < far / 2, (near, far)  # A4 layers were not computed as A4
    assert distance(ran, found[4]) > far
    if bits == 8:
        done = in_environment(
            "serve_worker.py", str(folders["folder"]), *asked, VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_INT4_W4A8="0"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        alone = json.loads((tmp_path / "a.json").read_text())["answers"][str(folders["folder"])]["logprobs"]
        assert distance(alone, ran) > 1e-4  # so without the variable something was rounded


def test_the_rules_are_those_of_this_vllm():
    done = in_environment("serve_kernels.py")
    assert done.returncode == 0, done.stderr[-3000:]
    stored = json.loads((ROOT / "tests" / "targets" / "served" / "vllm_selection.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == stored
