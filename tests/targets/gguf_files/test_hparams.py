"""Rotary scaling and head sizes: llama.cpp must compute what transformers computes from the same config."""

import pytest
import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.loading import find, load
from halfbyte.targets.gguf_files.metadata import rope_frequency_factors
from halfbyte.targets.gguf_files.writer import check_gguf, write_gguf
from tests.tiny_models import F16, keys, kl_of_llamacpp, logits_of, some_ids

THETA = {"rope_theta": 10000.0}
LINEAR = {**THETA, "rope_type": "linear", "factor": 4.0}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    **THETA,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def kl_of(source, path, count=300):
    write_gguf(path, source, **F16)
    ids = some_ids(source, count)
    return kl_of_llamacpp(path, ids, logits_of(source.model, ids))


SCALINGS = [{"rope_theta": 500.0}, LINEAR, YARN, {**YARN, "attention_factor": 1.5}]
CASES = [("llama", rope) for rope in SCALINGS] + [(family, SCALINGS[3]) for family in ("qwen2", "qwen3", "mistral")]


@pytest.mark.parametrize(("family", "rope"), CASES, ids=str)
def test_rotary_scaling(tiny, tmp_path, family, rope):
    assert kl_of(tiny(family, rope_parameters={"rope_type": "default", **rope}), tmp_path / "m.gguf") < 1e-5


@pytest.mark.usefixtures("own_cache")
def test_llama3_scaling_is_a_tensor_and_no_gguf_source(tiny, tmp_path):
    source = tiny("llama", rope_parameters=LLAMA3)
    assert kl_of(source, tmp_path / "m.gguf") < 1e-5
    factors = rope_frequency_factors(source.config)
    assert factors.shape == (16,)
    assert float(factors[0]) == 1.0
    assert float(factors[-1]) == pytest.approx(8.0)
    assert check_gguf(tmp_path / "m.gguf", source) == 22
    with pytest.raises(HalfbyteError, match="rope scaling of a GGUF source is not supported"):
        load(find(str(tmp_path / "m.gguf")), device=torch.device("cpu"), dtype=torch.float32)


def test_without_scaling_there_is_no_tensor(tiny):
    assert rope_frequency_factors(tiny("llama").config) is None


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        ("qwen2", LLAMA3, "no such rotary scaling"),
        ("llama", {**THETA, "rope_type": "dynamic", "factor": 2.0}, "no such rotary scaling"),
        ("llama", {**YARN, "beta_slow": 2.0}, "beta_slow"),
    ],
)
def test_scaling_that_llamacpp_lacks_is_refused(tiny, tmp_path, family, rope, message):
    with pytest.raises(HalfbyteError, match=message):
        write_gguf(tmp_path / "m.gguf", tiny(family, rope_parameters=rope))
    assert list(tmp_path.iterdir()) == []


def test_other_activation_functions_are_refused(tiny, tmp_path):
    with pytest.raises(HalfbyteError, match="expected silu, got gelu"):
        write_gguf(tmp_path / "m.gguf", tiny("llama", hidden_act="gelu"))


def test_head_size_of_its_own(tiny, tmp_path):
    assert kl_of(tiny("llama", head_dim=64), tmp_path / "m.gguf") < 1e-5
    found = keys(tmp_path / "m.gguf")
    assert found["llama.attention.key_length"] == found["llama.attention.value_length"] == 64
    assert found["llama.rope.dimension_count"] == 64


def test_biases_of_llama(tiny, tmp_path):
    assert kl_of(tiny("llama", attention_bias=True, mlp_bias=True), tmp_path / "m.gguf") < 1e-5


def test_sliding_window_agrees_up_to_its_size(tiny, tmp_path):
    assert kl_of(tiny("mistral", sliding_window=64), tmp_path / "m.gguf", count=64) < 1e-5
    assert keys(tmp_path / "m.gguf")["llama.attention.sliding_window"] == 64
