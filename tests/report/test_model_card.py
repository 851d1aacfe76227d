"""The card of an exported folder names what others know."""

from __future__ import annotations

from halfbyte.plan import LayerPlan, Plan
from halfbyte.report.model_card import model_card


def card(model_id, **search):
    layers = {f"model.layers.{block}.mlp.down_proj": LayerPlan(4, 4, 128) for block in range(2)}
    plan = Plan(
        model_id, "f00d", "vllm", "fused", layers, 0.5, 0.5, text={"name": "pydoc"}, search=search, hardware="sm89"
    )
    return model_card(plan, {"int4 g128, A4": 2}, "Run it.", ["humming"], "model.layers", 10**9, model_id)


def test_a_hub_id_is_the_base_model_and_a_path_is_not():
    assert "\nbase_model: Qwen/Qwen2.5-7B-Instruct\n" in card("Qwen/Qwen2.5-7B-Instruct")
    for model_id, name in [("/home/someone/secret/m7", "m7"), ("demo", "SmolLM2-135M-Instruct")]:
        text = card(model_id)
        assert "base_model:" not in text
        assert f"# {name}, 4-bit" in text
        assert "/home" not in text


def test_only_a_kl_is_called_one():
    assert "Nothing on the whole model" in card("a/b", fitness="mse", scores={"plan": 1.0})
    text = card("a/b", fitness="kl", scores={"plan": 0.25}, validation={"plan": 0.5})
    assert "KL(original ‖ quantised)" in text
    assert [line for line in text.splitlines() if line.startswith("| plan ") and "0.250" in line and "0.500" in line]


def test_how_to_run_it_is_said():
    text = card("a/b")
    assert "\n- humming\n- vllm\n" in text
    assert "sm89" in text
    assert "Run it." in text
