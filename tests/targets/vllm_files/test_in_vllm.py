"""An exported plan in vLLM on this machine's GPU: the kernels that were planned, and the KL that was simulated.

    HALFBYTE_SERVE_PYTHON=ENV/bin/python pytest tests/targets/vllm_files/test_in_vllm.py

Opt-in, and skipped without a GPU and a Python with vLLM: neither CI nor a machine without a GPU can run it. The same
steps with a stand-in for vLLM, on any machine, are in ``tests/evaluate/test_served.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halfbyte import cli
from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.measure_served import serve_python
from tests.targets.plans import PLAN, plan_for

# Bits of the units in turn, and what vLLM has to say about its kernels, by compute capability (major).
PLANNED = {
    8: ((4, 8), []),  # it says nothing about Humming; the folder allows no other kernel
    9: ((8, 16), ["CutlassW4A8LinearKernel for CompressedTensorsW4A8Fp8", "MacheteLinearKernel for CompressedTensors"]),
}
SHARE, NOISE = 0.2, 5e-3  # of the KL that was simulated, and nats: the engine sums in another order, in bf16


def missing() -> str:
    """Why this machine cannot run the test; empty if it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.cuda.get_device_capability()[0] not in PLANNED:
        return "no kernels are known for this GPU"
    try:
        serve_python(None)
    except HalfbyteError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.serve, pytest.mark.gpu, pytest.mark.skipif(bool(missing()), reason=missing() or "runs")]


def evaluated(*arguments: str) -> dict:
    assert cli.run("eval", [*arguments, "--text", "pydoc", "--ctx", "256", "--chunks", "8", "--json", "e.json"]) == 0
    result = json.loads(Path("e.json").read_text(encoding="utf-8"))
    Path("e.json").unlink()
    return result


def test_the_engine_has_the_kl_that_was_simulated(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_bits, kernels = PLANNED[torch.cuda.get_device_capability()[0]]
    model = str(tiny_folder("qwen2", hidden_size=256, num_attention_heads=4, head_dim=64, intermediate_size=512))
    plan_for(Path(model), a_bits=a_bits, hardware="auto")
    assert cli.run("export vllm", ["--config", PLAN, "--output", "folder"]) == 0
    simulated = evaluated("--config", PLAN)
    served = evaluated("--model_id", model, "--served", "folder")
    difference = abs(served["kld_mean"] - simulated["kld_mean"])
    assert difference <= SHARE * simulated["kld_mean"] + NOISE, (served["kld_mean"], simulated["kld_mean"])
    for kernel in kernels:
        assert any(kernel in said for said in served["kernels"]), (kernel, served["kernels"])
