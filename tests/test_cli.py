"""The four commands end to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halfbyte import cli
from halfbyte.plan import codes_path, load_codes, load_plan
from halfbyte.report.terminal import Drawing
from tests.command_line import CODES, EVAL, GA, QUICK, changed, fails, search


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "llama"])
def test_the_four_commands(family, tiny_folder, here, capsys):
    folder = tiny_folder(family)
    assert search(folder, "--spaces", "auto", "--verbose", "--json", "plan-search.json") == 0
    plan = load_plan("mixed_precision_config.pt")
    assert len(plan.layers) == 14
    assert len(plan.tensors) == 15 + ("tied" not in family)
    assert plan.file["nbytes"] <= plan.file["capacity"]
    assert plan.budget_reached <= plan.budget_asked == 0.75
    assert {entry.a_bits for entry in plan.layers.values()} == {4, 8}
    for name, entry in plan.layers.items():  # q, k and v share one choice, gate and up another
        first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        assert entry.a_bits == plan.layers[first].a_bits
    assert "knapsack" in capsys.readouterr().out
    stem = "mixed_precision_config"
    for suffix in ("sensitivity.json", "sensitivity.csv", "sensitivity.png", "history.json", "convergence.png"):
        assert (here / f"{stem}.{suffix}").stat().st_size > 100
    assert not list(here.glob(".*work*"))

    stages = json.loads(Path("plan-search.json").read_text())["measured"]["stages"]
    assert stages["KL of each matrix"]["seconds"] > 0
    assert stages["KL of each matrix"]["host"] > 10**8

    assert cli.run("export", ["--output", "models/mixed.gguf", "--json", "export.json"]) == 0
    assert "models/mixed.gguf" in Path(f"{stem}.report.html").read_text()
    assert json.loads(Path("export.json").read_text())["kl"] < 0.05
    assert f"{len(plan.tensors)} matrices hold exactly what was searched" in capsys.readouterr().out
    assert cli.run("export", ["--policy", "exact", "--output", "models/exact.gguf"]) == 0
    assert "14 matrices hold exactly what was searched" in capsys.readouterr().out

    assert cli.run("simulate", [*EVAL, "--json", "s.json"]) == 0
    simulated = {row["name"]: row["quality"] for row in json.loads(Path("s.json").read_text())["rows"]}
    assert simulated["all A8"]["kld_mean"] < simulated["all A4"]["kld_mean"]
    if family != "qwen2-tied":  # four processes that load torch: one family is enough
        return
    assert cli.run("compare", [*EVAL, "--mixed_path", "models/mixed.gguf", "--json", "compare.json"]) == 0
    rows = {row["name"]: row for row in json.loads(Path("compare.json").read_text())["rows"]}
    assert set(rows) == {"original", "original, F16 GGUF", "Q4_K_M", "mixed"}
    assert not [row["missing"] for row in rows.values() if row["missing"]]
    f16, mixed = rows["original, F16 GGUF"], rows["mixed"]
    assert rows["original"]["quality"]["ppl"] == pytest.approx(f16["quality"]["ppl"], rel=1e-2)
    assert rows["original"]["quality"]["kld_mean"] < 1e-3  # two engines, one model
    assert f16["quality"]["kld_mean"] is None  # it is the reference
    assert mixed["measured"]["peak_memory"] < rows["original"]["measured"]["peak_memory"]
    assert mixed["quality"]["kld_mean"] > 0
    assert mixed["measured"]["bytes"] <= rows["Q4_K_M"]["measured"]["bytes"] < f16["measured"]["bytes"]
    assert simulated["GGUF types"]["kld_mean"] == pytest.approx(mixed["quality"]["kld_mean"], rel=0.3)
    assert simulated["original"]["ppl"] == pytest.approx(rows["original"]["quality"]["ppl"], rel=1e-4)


def test_simulated_weights_are_the_exported_weights(tiny_folder, here):
    """Promise 1: dequantised GGUF tensor == simulated weight, every layer."""
    from gguf import GGUFReader, dequantize

    from halfbyte.models.gguf_source import halves_from_pairs
    from halfbyte.prepare.simulation import become_simulation_, load_for_plan

    assert search(tiny_folder("llama"), "--output", "plan.json") == 0
    assert cli.run("export", ["--config", "plan.json", "--output", "m.gguf", "--policy", "exact"]) == 0
    plan = load_plan("plan.json")
    source = load_for_plan(plan, None, device="cpu", dtype="fp32")
    codes = load_codes(codes_path("plan.json"))
    assert any(bool((weight.scales < 0).any()) for weight in codes.weights.values())
    become_simulation_(source, codes, plan.layers)
    tensors = {tensor.name: tensor for tensor in GGUFReader("m.gguf").tensors}
    for name in plan.layers:
        tensor = tensors[source.family.gguf_name(f"{name}.weight")]
        assert tensor.tensor_type.name == "Q4_0"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        values = halves_from_pairs(values, heads) if heads else values
        assert torch.equal(values, source.model.get_submodule(name).weight), name


@pytest.mark.parametrize("transforms", ["auto", "r1,r4", "none"])
def test_plans_for_the_simulation(transforms, tiny_folder, here):
    """What the search scored is near what the simulation measures on other text."""
    assert search(tiny_folder("qwen2-tied"), "--target", "sim", "--transforms", transforms) == 0
    plan = load_plan("mixed_precision_config.pt")
    assert all(entry.rank > 0 and entry.rotated for entry in plan.layers.values()) == (transforms == "auto")
    assert set(plan.search["channel_scales"]) == (set(load_codes(CODES).low_rank) if transforms == "auto" else set())
    assert cli.run("simulate", [*EVAL, "--json", "s.json"]) == 0
    measured = {row["name"]: row["quality"]["kld_mean"] for row in json.loads(Path("s.json").read_text())["rows"]}
    assert measured["all A8"] < measured["plan"] < measured["all A4"]
    for name in ("all A8", "all A4", "plan"):
        assert plan.search["scores"][name] == pytest.approx(measured[name], rel=0.5)


def test_a_tied_model_may_be_rotated_for_gguf(tiny_folder, here, capsys):
    """R1 gives the file an output matrix of its own; llama.cpp must agree with the simulation."""
    from gguf import GGUFReader

    assert search(tiny_folder("llama-tied"), "--transforms", "smooth,r1,r2") == 0
    assert cli.run("export", ["--output", "m.gguf"]) == 0
    assert "output.weight" in {tensor.name for tensor in GGUFReader("m.gguf").tensors}


@pytest.mark.parametrize("target", ["gguf", "sim"])
def test_dead_inputs_are_in_the_outcome_table(target, tiny_folder, here, tmp_path_factory):
    folder = changed(tiny_folder("llama"), tmp_path_factory, "model.layers.1.mlp.up_proj.weight", factor=0)
    assert search(folder, "--target", target) == 0
    rows = Path("mixed_precision_config.outcome.csv").read_text().splitlines()
    noted = [row.split(",")[0] for row in rows if "rounded to nearest: the Hessian is not positive definite" in row]
    assert noted == ["model.layers.1.mlp.down_proj"]


def test_tiered_policy_puts_a8_layers_in_q8_0(tiny_folder, here, capsys):
    from gguf import GGUFReader

    assert search(tiny_folder("qwen2")) == 0
    assert cli.run("export", ["--output", "t.gguf", "--policy", "tiered"]) == 0
    plan = load_plan("mixed_precision_config.pt")
    kinds = [tensor.tensor_type.name for tensor in GGUFReader("t.gguf").tensors if tensor.name.startswith("blk")]
    assert kinds.count("Q8_0") == sum(entry.a_bits == 8 for entry in plan.layers.values())
    assert kinds.count("Q4_0") == sum(entry.a_bits == 4 for entry in plan.layers.values())


@pytest.mark.parametrize("fitness", ["kl", "fisher", "mse"])
@pytest.mark.parametrize("granularity", ["fused", "layer"])
def test_fitness_and_granularity(fitness, granularity, tiny_folder, here, capsys):
    assert search(tiny_folder("qwen2"), "--fitness", fitness, "--granularity", granularity, "--transforms", "none") == 0
    history = json.loads(Path("mixed_precision_config.history.json").read_text())
    decisive = history["validation"] if fitness == "kl" else history["scores"]  # other text decides, where there is one
    starts = [score for label, score in decisive.items() if label == "rule" or "knapsack" in label]
    assert decisive["plan"] <= min(starts) + history["noise_floor"]
    scores = history["scores"]
    assert scores["all A8"] <= scores["plan"] <= scores["all A4"]


def test_same_seed_same_plan_and_symmetric(tiny_folder, here):
    folder = tiny_folder("llama")
    for output in ("a.json", "b.json"):
        assert search(folder, "--output", output, "--symmetric", "--seed", "7") == 0
    assert load_plan("a.json").layers == load_plan("b.json").layers
    assert load_plan("a.json").hash == load_plan("b.json").hash
    assert all(entry.a_symmetric for entry in load_plan("a.json").layers.values())


def test_a_limit_of_device_memory_is_for_a_gpu(tiny_folder, here, capsys):
    limited = search(tiny_folder("llama"), "--device", "cpu", "--device_memory", "8GB")
    fails(capsys, limited, match="--device_memory: only for a GPU with CUDA, got cpu")
    fails(capsys, search(tiny_folder("llama"), "--device_memory", "much"), match="--device_memory")


def test_text_the_model_writes_itself(tiny_folder, here, capsys):
    folder = tiny_folder("llama")
    assert cli.run("search", ["--model_id", str(folder), *QUICK, *GA, "--calib", "self"]) == 0
    assert load_plan("mixed_precision_config.pt").text["name"] == "self"


@pytest.mark.parametrize("fitness", ["kl", "fisher"])
def test_resumed_at_the_start_of_the_search_ends_in_the_same_plan(fitness, tiny_folder, here, monkeypatch):
    """Everything that runs at run time is there again: rotations, low-rank transforms, ranges."""
    arguments = ["--target", "sim", "--transforms", "smooth,r2,online,learned", "--fitness", fitness]
    folder = tiny_folder("qwen2-tied")
    assert search(folder, *arguments, "--output", "whole.json") == 0

    def interrupt(*_):
        if (here / ".stopped.json.work" / "prepared.json").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Drawing, "report", interrupt)
        assert search(folder, *arguments, "--output", "stopped.json") == 2
    assert (here / ".stopped.json.work" / "prepared.json").exists()
    assert search(folder, *arguments, "--output", "stopped.json", "--resume") == 0
    whole, stopped = load_plan("whole.json"), load_plan("stopped.json")
    assert whole.hash == stopped.hash
    assert whole.search == stopped.search


def test_missing_rows_are_named_and_the_others_run(tiny_folder, here, capsys):
    folder = str(tiny_folder("llama"))
    quick = ["--model_id", folder, "--max_tokens", "4", "--text", "pydoc", "--ctx", "64", "--chunks", "1"]
    fails(capsys, cli.run("compare", ["--skip_original", *quick]), match="nothing to compare")
    assert cli.run("compare", quick) == 0
    out = capsys.readouterr().out
    assert "mixed: no file" in out
    assert "export_gguf_official.py" in out
    q4km = next(Path("models").glob("*Q4_K_M.gguf"))
    q4km.rename(q4km.with_name(q4km.name.lower()))  # as Qwen's own repository spells it
    capsys.readouterr()
    assert cli.run("compare", ["--skip_original", *quick]) == 0
    assert "Q4_K_M  " in capsys.readouterr().out
    q4km = q4km.with_name(q4km.name.lower())
    arguments = ["--skip_original", "--q4km_path", str(q4km), *quick]
    assert cli.run("compare", arguments) == 0
    out = capsys.readouterr().out
    assert "Q4_K_M" in out
    assert "original" not in out.split("mixed: no file")[0]


@pytest.mark.parametrize("what", ["model", "plan", "gguf"])
def test_eval_is_one_ruler(what, tiny_folder, here):
    folder = tiny_folder("llama")
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    arguments = ["--text", "text.txt", "--ctx", "64", "--chunks", "3", "--json", "out.json"]
    if what != "model":
        assert search(folder) == 0
    if what == "plan":
        arguments += ["--config", "mixed_precision_config.pt"]  # it knows its model
    else:
        arguments += ["--model_id", str(folder)]
    if what == "gguf":
        assert cli.run("export", ["--output", "m.gguf"]) == 0
        arguments += ["--gguf", "m.gguf"]
    assert cli.main(["eval", *arguments]) == 0
    result = json.loads(Path("out.json").read_text())
    assert result["tokens"] == 3 * 31
    if what == "model":
        assert result["kld_mean"] is None
    else:
        assert 0 < result["kld_mean"] < 5
        assert 0 <= result["top1_agreement"] <= 1
        assert result["ppl_reference"] > 1
        assert result["tokenizers_agree"] is (True if what == "gguf" else None)
    assert result["ppl"] > 1


def test_eval_never_scores_text_of_the_search(tiny_folder, here):
    """A plan searched on a file is evaluated on the part of that file that the search has not seen."""
    from halfbyte.evaluate.quality import evaluation_text

    Path("text.txt").write_text("".join(f"line {number} of a text\n" for number in range(2000)))
    assert search(tiny_folder("llama"), "--calib", "text.txt") == 0
    plan = load_plan("mixed_precision_config.pt")
    name, texts = evaluation_text(str(Path("text.txt").resolve()), plan.text["search"])
    assert "eval part" in name
    (text,) = texts.values()
    assert "line 1400 " not in text
    assert "line 1500 " in text
    assert evaluation_text("text.txt", None)[1]["text.txt"].startswith("line 0 ")


def test_doctor(tiny_folder, here, capsys):
    assert cli.main(["doctor", "--model_id", str(tiny_folder("llama")), "--json", "d.json"]) == 0
    report = json.loads(Path("d.json").read_text())
    assert "8-bit activations" in report["llama.cpp"]
    assert "weights" in report["model"]
    assert cli.main(["doctor", "--model_id", "no/such/model/x"]) == 2
