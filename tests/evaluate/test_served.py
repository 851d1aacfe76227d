"""Folders in vLLM, with a stand-in for vLLM in the worker's process: everything but vLLM itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte import cli
from halfbyte.core.environment import ALLOCATOR, use_growing_segments, variables_of_others
from halfbyte.core.files import MANIFEST
from halfbyte.engines.served import serve_worker
from halfbyte.engines.served.serve_worker import own_words, prompt_rows
from halfbyte.evaluate.measure_served import KERNEL, cause
from halfbyte.evaluate.worker import WorkerError
from tests.command_line import ROOT, fails
from tests.targets.plans import PLAN, plan_for

TEXT = ["--text", "pydoc", "--ctx", "128", "--chunks", "2"]
SAID = "Using FakeLinearKernel for CompressedTensorsW4A8Fp8"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HALFBYTE_SERVE_PYTHON", raising=False)
    return tmp_path


@pytest.fixture
def vllm(here, monkeypatch):
    """The stand-in, where the worker finds it; this process does not look there."""
    package = here / "packages" / "vllm"
    package.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("fake_vllm.py"), package / "__init__.py")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return ["--serve_python", sys.executable]


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """A model, and the same with other weights in one place."""
    original = tiny_folder("qwen2")
    changed = shutil.copytree(original, tmp_path_factory.mktemp("changed") / "other")
    tensors = load_file(changed / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] *= 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    return original, changed


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def kl(reference, model):
    """KL of the second halves of the two windows, from transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from halfbyte.evaluate.quality import evaluation_text, windows_of

    texts = evaluation_text("pydoc", None)[1]
    windows, _ = windows_of(AutoTokenizer.from_pretrained(reference), texts, 128, 2, where="")
    p, q = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor(windows)).logits
        for folder in (reference, model)
    )
    p, q = (logits[:, 64:-1].log_softmax(-1) for logits in (p, q))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("runner", ["old", "new"])
def test_eval_has_the_kl_of_the_folder(runner, vllm, folders, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_RUNNER", runner)
    original, changed = folders
    arguments = ["--model_id", str(original), "--served", str(changed), "--device", "cpu", *TEXT, *vllm]
    assert cli.run("eval", [*arguments, "--json", "out.json"]) == 0
    result = json.loads(Path("out.json").read_text())
    assert result["tokens"] == 2 * 63
    assert result["kld_mean"] == pytest.approx(kl(original, changed), rel=1e-3)
    assert result["kld_mean"] > 1e-3
    assert result["engine"] == "vLLM 0.0.fake (cpu)"
    assert result["kernels"] == [SAID]
    assert SAID in capsys.readouterr().out


def test_two_gpus_give_the_kl_of_one(vllm, folders):
    original, changed = folders
    arguments = ["--model_id", str(original), "--served", str(changed), "--device", "cpu", *TEXT, *vllm]
    assert cli.run("eval", [*arguments, "--tensor_parallel", "2", "--json", "out.json"]) == 0
    assert json.loads(Path("out.json").read_text())["kld_mean"] == pytest.approx(kl(original, changed), rel=1e-3)


def test_the_library_finds_vllm_by_the_variable(vllm, folders, monkeypatch):
    original, _ = folders
    monkeypatch.setenv("HALFBYTE_SERVE_PYTHON", vllm[1])
    result = halfbyte.evaluate(original, served=original, device="cpu", text="pydoc", ctx=128, chunks=2)
    assert result.quality.kld_mean == pytest.approx(0, abs=1e-6)
    assert result.quality.top1_agreement == 1


def test_rows_that_are_not_the_prompts_are_noticed(vllm, folders, capsys, monkeypatch):
    original, _ = folders
    monkeypatch.setenv("FAKE_SHIFT", "0.5")
    code = cli.run("eval", ["--model_id", str(original), "--served", str(original), "--device", "cpu", *TEXT, *vllm])
    fails(capsys, code, match="not those that vLLM scores with")


def test_compare_has_a_row_for_every_folder(vllm, folders, here, capsys):
    original, changed = folders
    refused = shutil.copytree(original, here / "refused")
    change_config(refused, quantization_config={"quant_method": "magic"})
    arguments = ["--model_id", str(original), "--device", "cpu", "--max_tokens", "4", *TEXT, *vllm, "--json", "o.json"]
    assert cli.run("compare", [*arguments, "--served", f"{original},{refused},{changed},{here / 'none'}"]) == 0
    out = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(Path("o.json").read_text())["rows"]}
    same, other = rows[f"vLLM: {original.name}"], rows["vLLM: other"]
    assert same["quality"]["kld_mean"] == pytest.approx(0, abs=1e-3)  # F16 in llama.cpp is the reference
    assert other["quality"]["kld_mean"] == pytest.approx(kl(original, changed), rel=0.1)
    assert other["note"] == SAID
    for key in ("prompt_tokens_per_second", "generation_tokens_per_second", "load_seconds", "peak_memory", "bytes"):
        assert same["measured"][key] > 0
    assert "Unknown quantization method: magic." in rows["vLLM: refused"]["missing"]
    assert "pydantic" not in rows["vLLM: refused"]["missing"]
    assert "no such model" in rows["vLLM: none"]["missing"]
    assert rows["original"]["measured"]
    assert "vLLM: other" in out


def test_compare_without_vllm_says_how_to_get_it(folders, here):
    original, _ = folders
    score = {"text": "pydoc", "ctx": 64, "chunks": 1, "device": "cpu", "max_tokens": 2}
    rows = {row.name: row for row in halfbyte.compare(model_id=str(original), served=str(original), **score).rows}
    assert "pip install vllm==" in rows[f"vLLM: {original.name}"].missing
    assert rows["original"].measured


@pytest.mark.parametrize(
    ("python", "match"),
    [(None, "vLLM is not installed in this Python"), ("no-such-python", "no such Python"), (sys.executable, "there")],
)
def test_eval_without_vllm(python, match, folders, here, capsys):
    original, _ = folders
    more = ["--serve_python", python] if python else []
    code = cli.run("eval", ["--model_id", str(original), "--served", str(original), *TEXT, *more])
    fails(capsys, code, match=match)


def test_a_folder_that_vllm_refuses(vllm, folders, here, capsys):
    original, _ = folders
    refused = shutil.copytree(original, here / "refused")
    change_config(refused, quantization_config={"quant_method": "magic"})
    code = cli.run("eval", ["--model_id", str(original), "--served", str(refused), *TEXT, *vllm])
    fails(capsys, code, match="vLLM does not run it, got Unknown quantization method: magic.")


def test_a_folder_of_another_model(vllm, folders, tiny_folder, here, capsys):
    original, _ = folders
    larger = tiny_folder("qwen2", vocab_size=1000)
    code = cli.run("eval", ["--model_id", str(original), "--served", str(larger), *TEXT, *vllm])
    fails(capsys, code, match="expected vocab_size")
    marked = shutil.copytree(original, here / "marked")
    (marked / MANIFEST).write_text(json.dumps({"fingerprint": "another"}))
    code = cli.run("eval", ["--model_id", str(original), "--served", str(marked), "--device", "cpu", *TEXT, *vllm])
    fails(capsys, code, match="made from another model")


def test_an_engine_that_is_too_old(vllm, folders, here, capsys):
    original, _ = folders
    newer = shutil.copytree(original, here / "newer")
    (newer / MANIFEST).write_text(json.dumps({"vllm": "0.33"}))
    score = ["--model_id", str(original), "--served", str(newer), "--device", "cpu", *TEXT, *vllm]
    about = here / "packages" / "vllm-0.26.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    fails(capsys, cli.run("eval", score), match="expected 0.33 or newer, got 0.26.0")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.1\n")
    assert cli.run("eval", score) == 0
    (newer / MANIFEST).write_text(json.dumps({"vllm": "new"}))
    fails(capsys, cli.run("eval", score), match="halfbyte.json, vllm: string should match pattern")


@pytest.mark.parametrize("answer", ["printf '\\377\\n{'", "echo new", "exit 3", "kill -9 $$"])
def test_a_python_that_answers_in_a_strange_way(answer, tiny_folder, here, capsys):
    python = here / "python"
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    folder = str(tiny_folder("qwen2"))
    asked = ["--model_id", folder, "--served", folder, "--serve_python", str(python)]
    fails(capsys, cli.run("eval", [*asked, "--device", "cpu", *TEXT]), match="vLLM is not installed there")


@pytest.mark.parametrize(("capability", "backend"), [((9, 0), "emulation"), ((10, 0), None), ((12, 1), None)])
def test_a_blackwell_folder_is_emulated_elsewhere(capability, backend, tiny_folder, here, monkeypatch):
    """Older GPUs would leave activations as they are."""
    plan_for(tiny_folder("llama"), a_bits=(4, 16), hardware="blackwell")
    assert cli.run("export vllm", ["--config", PLAN, "--output", "folder", "--no-check"]) == 0
    below = json.loads((here / "folder" / MANIFEST).read_text())["emulated_below"]
    asked = {}
    monkeypatch.setattr(serve_worker, "engine", lambda: SimpleNamespace(LLM=lambda **settings: asked.update(settings)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    serve_worker.load(serve_worker.Job("folder", "x", emulated_below=below))
    assert asked.get("linear_backend") == backend


def test_an_allocator_of_our_own_is_not_passed_on(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv(ALLOCATOR, raising=False)
    use_growing_segments()
    assert os.environ.get(ALLOCATOR, "").startswith("expandable") is (sys.platform == "linux")
    assert ALLOCATOR not in variables_of_others()
    monkeypatch.setenv(ALLOCATOR, "max_split_size_mb:64")
    assert variables_of_others()[ALLOCATOR] == "max_split_size_mb:64"


def test_one_thing_at_a_time(here, capsys):
    fails(capsys, cli.run("eval", ["--served", "a", "--gguf", "b"]), match="one excludes the other")
    fails(capsys, cli.run("eval", ["--served", "a"]), match="a: no such model")


def test_an_exported_plan_answers_as_simulated(vllm, tiny_folder, here):
    """transformers, behind the stand-in, rounds inputs as the folder says; its products are not CUTLASS's."""
    model = tiny_folder("qwen2")
    plan_for(model, a_bits=(8, 16), hardware="hopper")
    assert cli.run("export vllm", ["--config", PLAN, "--output", "folder"]) == 0
    score = {"device": "cpu", "text": "pydoc", "ctx": 128, "chunks": 2}
    simulated = halfbyte.evaluate(model, plan=PLAN, **score).quality
    served = halfbyte.evaluate(model, served="folder", serve_python=vllm[1], **score).quality
    assert served.kld_mean == pytest.approx(simulated.kld_mean, rel=0.1)
    assert served.ppl_reference == pytest.approx(simulated.ppl_reference, rel=1e-6)


def test_the_benchmark_of_serving(vllm, folders, here):
    original, changed = folders
    sizes = ["--prompts", "2", "--prompt_tokens", "32", "--sequences", "1", "2", "--new_tokens", "4"]
    few = [*sizes, "--runs", "1", "--json", "out.json"]
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), *few, *vllm]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "src")])}
    done = subprocess.run(
        [*command, "--folders", f"bf16={original}", f"other={changed}", f"none={here}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert list(rows[1]["generation_tokens_per_second"]) == ["1", "2"]
    assert "no such model" in rows[2]["missing"]
    assert "| other" in done.stdout
    assert "1.00×" in done.stdout


@pytest.mark.parametrize("shapes", [[1, 7], [1, 8], [1, 4, 4], [1, 6, 1], [1, 7, 1]])
def test_the_rows_of_a_prompt(shapes):
    """8 tokens: the sampled row, then 7 or 8 rows in chunks."""
    seen = [torch.full((count, 3), float(at)) for at, count in enumerate(shapes)]
    assert bool((prompt_rows(seen, 8) > 0).all())


def test_an_engine_that_computes_other_rows_is_an_error():
    with pytest.raises(RuntimeError, match=r"got rows \[1, 5\]"):
        prompt_rows([torch.zeros(1, 3), torch.zeros(5, 3)], 8)


def test_an_error_of_another_process_is_told_in_its_own_words():
    """With several GPUs the process that we wait for knows only that one of its own has failed."""
    said = "(Worker_TP1 pid=7) ERROR 11-26 ValueError: no kernel for sm75\nRuntimeError: failed, see root cause above"
    error = WorkerError("Engine core initialization failed. See root cause above.", said)
    assert cause(error) == "ValueError: no kernel for sm75"
    assert cause(WorkerError("cancelled", said)) == "ValueError: no kernel for sm75"
    assert cause(WorkerError("cancelled", "")) == "one of its processes ended, cancelled"
    assert cause(WorkerError("out of memory", said)) == "out of memory"


def test_what_an_engine_says():
    assert own_words(ValueError("")) == "ValueError"
    lines = [
        "INFO 11-26 [w4a8_fp8.py:98] Using CutlassW4A8LinearKernel for CompressedTensorsW4A8Fp8",
        "(Worker_TP0 pid=7) INFO [wNa16.py:153] Using MacheteLinearKernel for CompressedTensorsWNA16",
        "INFO Using FlashInferNvFp4LinearKernel for NVFP4 GEMM",
        "INFO Using FLASH_ATTN attention backend out of potential backends",
    ]
    assert [KERNEL.findall(line) for line in lines] == [
        ["Using CutlassW4A8LinearKernel for CompressedTensorsW4A8Fp8"],
        ["Using MacheteLinearKernel for CompressedTensorsWNA16"],
        ["Using FlashInferNvFp4LinearKernel for NVFP4 GEMM"],
        [],
    ]
