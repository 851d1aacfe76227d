"""Whole searches as a library call, on tiny models: plans of every target, scores, fronts, what is left behind."""

from __future__ import annotations

import gc
import json
import weakref

import pytest

from halfbyte.core.errors import HalfbyteError
from halfbyte.menus.activations import ActivationMenu
from halfbyte.menus.types import TypeMenu
from halfbyte.models.layers import layers_of
from halfbyte.plan import load_codes, load_plan
from halfbyte.quant.quant_linear import QuantLinear
from tests.searches import options, run, same

STARTS = {"rule", "KL knapsack", "Fisher knapsack", "KL + Fisher knapsack"}
AT = {"vllm": {"hardware": "ada"}}
LABELS = {"all A8", "all A4", "plan"} | STARTS


@pytest.fixture(scope="module")
def searched(tiny_folder, tmp_path_factory):
    """Target -> its search, once, and the folder that it left."""
    made = {}

    def get(target):
        if target not in made:
            folder = tmp_path_factory.mktemp(target)
            made[target] = (
                run(tiny_folder("qwen2"), folder / "plan.json", target, codes="decoded", **AT.get(target, {})),
                folder,
            )
        return made[target]

    return get


@pytest.mark.parametrize("target", ["sim", "gguf", "vllm"])
def test_every_target_gets_a_plan(searched, tiny, target):
    result, folder = searched(target)
    plan = load_plan(folder / "plan.json")
    assert same(plan, result.plan)
    assert list(plan.layers) == [layer.name for layer in layers_of(tiny("qwen2").model, tiny("qwen2").family)]
    assert load_codes(folder / "plan.safetensors").weights.keys() == plan.layers.keys()
    assert {entry.w_bits for entry in plan.layers.values()} == {4}
    assert {entry.a_bits for entry in plan.layers.values()} == {4, 8}
    assert plan.budget_reached <= plan.budget_asked == 0.75
    assert list(result.found) == (["activations", "types"] if target == "gguf" else ["activations"])
    assert set(folder.iterdir()) == set(result.files)  # and nothing else: no work folder, nothing partial


@pytest.mark.parametrize("target", ["sim", "gguf"])
def test_the_same_seed_gives_the_same_plan_also_from_packed_codes(searched, tiny_folder, tmp_path, target):
    again = run(tiny_folder("qwen2"), tmp_path / "plan.json", target, codes="packed")
    before, after = searched(target)[0].plan.to_dict(), again.plan.to_dict()
    before.pop("model_id"), after.pop("model_id")  # the same model in another folder
    assert before == after


def test_fused_layers_share_their_bits(searched):
    bits = {name: entry.a_bits for name, entry in searched("vllm")[0].plan.layers.items()}
    for block in range(2):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({bits[f"model.layers.{block}.{part}"] for part in group}) == 1


def test_other_text_decides(searched):
    result, _ = searched("gguf")
    about, found = result.plan.search, result.found["activations"]
    assert about["scores"].keys() == about["validation"].keys() == LABELS
    assert about["validation"]["all A8"] < about["validation"]["plan"] < about["validation"]["all A4"]
    assert about["validation"]["plan"] <= max(about["validation"][label] for label in STARTS)
    assert about["validation"] != about["scores"]
    assert about["winner"] in {*STARTS, "genetic search"}
    assert 1 <= about["ties"] <= about["finalists"]
    assert about["noise_floor"] > 0
    assert about["valid_tokens"] == about["search_tokens"] == 128
    assert len(found.history) == about["generations"]


@pytest.mark.parametrize(("fitness", "label"), [("mse", "MSE knapsack"), ("fisher", "Fisher knapsack")])
def test_layer_errors_as_the_score(tiny_folder, tmp_path, fitness, label):
    made = {"weights": "rtn", "fitness": fitness, "granularity": "layer"}
    result = run(tiny_folder("llama"), tmp_path / "plan.json", "sim", **made)
    found = result.found["activations"]
    assert found.search_scores["plan"] <= min(found.search_scores[label] for label in ("rule", label))
    assert set(found.search_scores) == {"rule", label, "all A8", "all A4", "plan"}
    assert found.winner == label  # the knapsack is exact for a sum of layer errors
    assert not found.validation_scores
    packed = run(tiny_folder("llama"), tmp_path / "packed.json", "sim", **made, codes="packed")
    assert packed.plan.layers == result.plan.layers
    assert packed.plan.search["scores"] == pytest.approx(result.plan.search["scores"], rel=1e-4)


def test_a_front_of_budgets(tiny_folder, tmp_path):
    quick = {"weights": "rtn", "transforms": "none", "ga_gen": 5, "pareto": True}
    result = run(tiny_folder("llama-tied"), tmp_path / "plan.json", "sim", **quick)
    front = json.loads((tmp_path / "plan.front.json").read_text())["points"]
    assert [point["budget"] for point in front] == [step / 20 for step in range(10, 21)]
    assert all(point["mean_bits"] <= 8 * point["budget"] + 1e-9 for point in front)
    about = result.plan.search["validation"]
    assert front[0]["kl_validation"] == about["all A4"]  # no choice at the ends
    assert front[5]["kl_validation"] == about["plan"]
    assert front[-1]["kl_validation"] == about["all A8"]
    assert front[-1]["kl_validation"] < front[5]["kl_validation"] < front[0]["kl_validation"]
    assert (tmp_path / "plan.front.csv").read_text().count("\n") == 12
    assert (tmp_path / "plan.front.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"pareto": True, "fitness": "mse"}, "--pareto: it needs the whole model's KL"),
        ({"target_compression": 0.4}, r"expected 0\.5 \(all A4\) to 1 \(all A8\), got 0\.4"),
        ({"ga_gen": -1}, "--ga_gen: out of range"),
        ({"spaces": "activations,types"}, "the target sim does not have this, expected activations, got types"),
        ({"transforms": "smooth,r9"}, "unknown transform"),
        ({"output": "plan.txt"}, "unknown plan format"),
    ],
)
def test_what_is_refused_before_any_work(tiny_folder, tmp_path, monkeypatch, more, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HalfbyteError, match=match):
        run(tiny_folder("llama"), **{"output": "plan.json", "target": "sim", **more})
    assert not list(tmp_path.iterdir())


def test_one_menu_at_a_time_has_its_model_in_memory(tiny_folder, tmp_path, monkeypatch):
    layers: weakref.WeakSet[QuantLinear] = weakref.WeakSet()
    left = []

    def of_activations(self, workdir, search=ActivationMenu.search):
        layers.update(part for part in self.on_search_text.model.modules() if isinstance(part, QuantLinear))
        left.append(len(layers))
        return search(self, workdir)

    def of_types(self, model, prepare=TypeMenu.prepare):
        gc.collect()
        left.append(len(layers))
        prepare(self, model)

    monkeypatch.setattr(ActivationMenu, "search", of_activations)
    monkeypatch.setattr(TypeMenu, "prepare", of_types)
    run(tiny_folder("llama"), tmp_path / "plan.json", "gguf", weights="rtn", transforms="none")
    assert left == [14, 0]


def test_a_report_that_cannot_be_written_leaves_no_report(tiny_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model = tiny_folder("llama")
    monkeypatch.setattr("halfbyte.menus.types.write_type_reports", full)
    with pytest.raises(OSError, match="No space"):
        run(model, tmp_path / "plan.json", "gguf", weights="rtn", transforms="none")
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []
    monkeypatch.undo()
    run(model, tmp_path / "plan.json", "gguf", weights="rtn", transforms="none", resume=True)
    assert (tmp_path / "plan.types.csv").is_file()


def test_nothing_is_overwritten_without_being_asked(searched, tiny_folder):
    _, folder = searched("vllm")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(HalfbyteError, match=r"plan\.json: output already exists.*--force"):
        run(tiny_folder("qwen2"), folder / "plan.json", "vllm", **AT["vllm"])
    (folder / "plan.json").unlink()
    with pytest.raises(HalfbyteError, match=r"plan\.safetensors: output already exists"):
        run(tiny_folder("qwen2"), folder / "plan.json", "vllm", **AT["vllm"])
    (folder / "plan.json").write_bytes(before[folder / "plan.json"])
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_options_say_what_they_are(tmp_path):
    """A value that is none is refused whoever makes the options."""
    with pytest.raises(HalfbyteError, match="--target: unknown"):
        options(tmp_path, tmp_path / "plan.json", "onnx")


def test_a_kl_that_is_asked_for_is_that_of_the_file(tiny_folder, tmp_path):
    """Of two menus the last one is what is exported; activation bits keep their own budget."""
    found = {}
    for limit in (0.004, 0.02):
        plan = run(tiny_folder("qwen2"), tmp_path / f"{limit}.json", "gguf", weights="rtn", max_kl=limit).plan
        assert plan.budget_asked == 0.75
        assert plan.file["validation"]["plan"] <= limit
        found[limit] = plan.file["nbytes"]
    assert found[0.004] > found[0.02]
    with pytest.raises(HalfbyteError, match="--max_kl, --ftype: one excludes the other"):
        run(tiny_folder("qwen2"), tmp_path / "p.json", "gguf", max_kl=0.1, ftype="Q4_K_M")
