"""Memory: what is counted, and what is said before the work."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config

from halfbyte.core.errors import HalfbyteError
from halfbyte.models import estimate
from halfbyte.models.estimate import estimate_load, estimate_search, estimate_types
from halfbyte.models.families import family_of
from halfbyte.models.loading import find, load

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAMILY = family_of("qwen2", where="test")


def seven_b(**changes):
    """Qwen2.5-7B's shape."""
    shape = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "dtype": torch.bfloat16,
    }
    return Qwen2Config(**{**shape, **changes})


def search(config, **more):
    return estimate_search(config, FAMILY, torch.bfloat16, 4096, 512, **more)


def test_a_packed_search_of_a_7b_model_takes_half_the_memory():
    config = seven_b()
    decoded, packed = search(config), search(config, packed=True)
    assert packed.parameters == decoded.parameters == pytest.approx(7.62e9, rel=0.01)
    assert packed.linear_parameters == pytest.approx(6.53e9, rel=0.01)
    assert 5.5e9 < packed.device < 8e9 < 15e9 < decoded.device < 19e9
    codes, matrix = packed.linear_parameters * 4.125 / 8, 2 * 152064 * 3584
    assert packed.device - packed.running == pytest.approx(codes + matrix, rel=0.001)  # and norms and biases
    assert packed.host == pytest.approx(codes + 2 * matrix, rel=0.001)
    assert decoded.host == pytest.approx(codes + 2 * decoded.parameters, rel=0.001)
    assert packed.on(CUDA) == max(packed.device, packed.preparation)
    assert packed.on(CPU) == packed.host + packed.running + packed.preparation


def test_preparation_of_a_packed_search_keeps_activations_in_main_memory():
    config = seven_b()
    decoded, packed = (estimate_search(config, FAMILY, torch.bfloat16, 32768, 512, packed=one) for one in (False, True))
    assert decoded.preparation == pytest.approx(12.1e9, rel=0.1)  # measured on an H200
    assert packed.on(CUDA) < 7.4e9
    kept = 4 * 32768 * (7 * 3584 + 2 * 18944)
    assert packed.host == int(packed.linear_parameters * 4.125 / 8) + kept
    assert decoded.host < decoded.parameters * 2 + packed.linear_parameters * 4.125 / 8 + 1
    assert search(config, packed=True).preparation == packed.preparation  # whatever the number of tokens


def types(config, calib=32768, **more):
    return estimate_types(config, FAMILY, torch.bfloat16, (calib, 8192), 512, **more)


def test_a_search_of_types_of_a_7b_model_fits_a_gpu_of_8_gb_if_packed():
    """Encoded rows without the embedding's; calibration activations are on one side or the other."""
    config = seven_b()
    decoded, packed, smaller = (
        types(config, nbytes=4.7e9),
        *(types(config, nbytes=x, packed=True) for x in (4.7e9, 4e9)),
    )
    assert packed.on(CUDA) < 7.4e9 < 15e9 < decoded.device < 22e9
    assert packed.device - smaller.device == pytest.approx(0.7e9 * (1 - 152064 * 3584 / packed.parameters), rel=0.01)
    activations = 4 * 32768 * (5 * 3584 + 18944)
    assert decoded.preparation - packed.preparation == packed.host - decoded.host == activations
    assert packed.on(CUDA) == types(config, 4096, nbytes=4.7e9, packed=True).on(CUDA)
    assert packed.on(CPU) < decoded.on(CPU) - 2 * 0.9 * decoded.parameters


def test_a_tied_embedding_is_the_head_and_gradients_need_it():
    tied, own = search(seven_b(tie_word_embeddings=True), packed=True), search(seven_b(), packed=True)
    assert tied.device == own.device
    assert own.host - tied.host == 2 * 152064 * 3584
    fisher = search(seven_b(), packed=True, gradients=True)
    assert fisher.device - fisher.running == own.device - own.running + 2 * 152064 * 3584


def test_what_is_stored_in_another_dtype_is_copied():
    mapped, copied = search(seven_b(), packed=True), search(seven_b(dtype=torch.float16), packed=True)
    assert copied.device == mapped.device
    kept = 4 * 4096 * (7 * 3584 + 2 * 18944)
    assert copied.host == pytest.approx(2 * copied.parameters + 0.516 * copied.linear_parameters + kept, rel=0.01)
    load, export = (
        estimate_load(seven_b(), FAMILY, torch.bfloat16, with_codes=True, packed=packed) for packed in (False, True)
    )
    assert load.on(CPU) > 18e9
    assert export.on(CPU) < 8e9


def test_too_little_memory_is_said_before_the_work(tiny_folder, monkeypatch):
    origin = find(str(tiny_folder("llama")))
    need = estimate_search(origin.config, origin.family, torch.float32, 4096, 512)
    model = load(origin, device=CPU, dtype=torch.float32).model
    assert need.parameters == sum(p.numel() for p in model.parameters())
    assert estimate.fits(need, CPU)
    estimate.check_memory(need, CPU)
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1000)
    assert not estimate.fits(need, CPU)
    with pytest.raises(HalfbyteError, match=r"too little memory on cpu.*expected 0.* GB"):
        estimate.check_memory(need, CPU)


def test_both_memories_count_beside_an_accelerator(monkeypatch):
    need = search(seven_b())
    for short in (CPU, CUDA):
        monkeypatch.setattr(estimate, "available_memory", lambda device, short=short: 0 if device == short else 1e12)
        assert not estimate.fits(need, CUDA)
        with pytest.raises(HalfbyteError, match=f"too little memory on {short.type}"):
            estimate.check_memory(need, CUDA)
