"""Quantise a model with llm-compressor and measure it with our ruler. Runs in the environment of ``peers_env.py``.

    PYTHONPATH=src python benchmarks/peers_worker.py REQUEST.json

The request names ``folder`` (the original, as transformers saves it), ``transform`` (smooth, rotate or none),
``rounding`` (rtn or gptq), ``a_bits``, ``form`` (int or nvfp4), the token windows ``calib`` and ``evaluation``, and
``result``, the JSON file to write. All
in fp32 on the CPU. What the scheme does not fix is llm-compressor's default.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from halfbyte.core.environment import peak_process_memory
from halfbyte.evaluate.quality import kl_per_token, live, measure, model_logits
from halfbyte.quant.int4 import fitting_group_size

GROUP_SIZE, W_BITS, WEIGHT_ROWS_LOOKED_AT = 128, 4, 64
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "numpy")


def load(folder: str) -> nn.Module:
    """The model in fp32, in evaluation mode, without gradients."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def scheme(model: nn.Module, a_bits: int, form: str) -> dict[str, QuantizationScheme]:
    """W4 symmetric in the groups that we would use and activations symmetric per token, or the library's NVFP4.

    The output head stays as it is.
    """
    if form == "nvfp4":
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return {"group": preset_name_to_scheme("NVFP4", [name for name in linears if name != "lm_head"])}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            names.setdefault(fitting_group_size(module.in_features, GROUP_SIZE), []).append(name)
    activations = QuantizationArgs(num_bits=a_bits, symmetric=True, strategy="token", dynamic=True)
    return {
        f"group_{size}": QuantizationScheme(
            targets=targets,
            weights=QuantizationArgs(num_bits=W_BITS, symmetric=True, strategy="group", group_size=size),
            input_activations=activations,
        )
        for size, targets in names.items()
    }


def quantise_(model: nn.Module, request: dict[str, Any]) -> float:
    """Run llm-compressor on the model, in place; seconds that it took."""
    groups = scheme(model, request["a_bits"], request["form"])
    transforms: list[Any] = []
    if request["transform"] == "smooth":
        transforms.append(SmoothQuantModifier())
    elif request["transform"] == "rotate":  # its plain "hadamard" would need widths that are powers of two
        transforms.append(SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard"))
    rounding = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[request["rounding"]]
    windows = [torch.tensor(window) for window in request["calib"]]
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]
    started = time.perf_counter()
    oneshot(
        model=model, recipe=[*transforms, rounding(config_groups=groups)], dataset=DataLoader(samples, batch_size=1)
    )
    return time.perf_counter() - started


def quantised_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers that have a quantisation scheme, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and getattr(module, "quantization_scheme", None) is not None
    }


def most_levels(rows: torch.Tensor) -> int:
    """The largest number of different values in a row of ``[..., n]``."""
    return int((rows.sort(dim=-1).values.diff(dim=-1) != 0).sum(dim=-1).max()) + 1


def levels_seen(model: nn.Module, logits_of: Any, window: list[int]) -> dict[str, tuple[int, int]]:
    """What each quantised layer really multiplies: most levels in activations that share a scale, and in such weights.

    llm-compressor quantises just before it calls ``nn.Linear.forward``, so that is where to look.
    """
    names = {module: name for name, module in quantised_layers(model).items()}
    seen: dict[str, tuple[int, int]] = {}
    multiply = nn.Linear.forward

    def look(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self in names:
            size = self.quantization_scheme.weights.group_size
            weight = self.weight[:WEIGHT_ROWS_LOOKED_AT].unflatten(-1, (-1, size))  # [rows, groups, group]
            inputs = self.quantization_scheme.input_activations
            shared = x.unflatten(-1, (-1, inputs.group_size)) if inputs is not None and inputs.group_size else x
            seen[names[self]] = (most_levels(shared), most_levels(weight))
        return multiply(self, x)

    nn.Linear.forward = look
    try:
        logits_of(window)
    finally:
        nn.Linear.forward = multiply
    return seen


@contextmanager
def without_activation_quantisation(model: nn.Module) -> Iterator[None]:
    """Leave activations alone while this is open."""
    kept = {module: module.quantization_scheme for module in quantised_layers(model).values()}
    for module, full in kept.items():
        module.quantization_scheme = full.model_copy(update={"input_activations": None})
    try:
        yield
    finally:
        for module, full in kept.items():
            module.quantization_scheme = full


@contextmanager
def without_quantisation(model: nn.Module) -> Iterator[None]:
    """Compute with the weights as they are stored while this is open; only plain rounding stores unquantised ones."""
    layers = list(quantised_layers(model).values())
    for module in layers:
        module.quantization_enabled = False
    try:
        yield
    finally:
        for module in layers:
            module.quantization_enabled = True


def online_rotations(model: nn.Module) -> list[nn.Linear]:
    """Layers that rotate their input when they are called (SpinQuant's R4)."""
    return [module for module in quantised_layers(model).values() if hasattr(module, "R4_input")]


@contextmanager
def without_online_rotations(model: nn.Module) -> Iterator[None]:
    """Take the rotating hooks away while this is open."""
    kept = {module: dict(module._forward_pre_hooks) for module in online_rotations(model)}
    for module in kept:
        module._forward_pre_hooks.clear()
    try:
        yield
    finally:
        for module, hooks in kept.items():
            module._forward_pre_hooks.update(hooks)


def check(model: nn.Module, original: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
    """What is really active in the model's forward pass, seen on the first evaluation window.

    Returns:
        ``layers`` quantised; ``activation_levels`` and ``weight_levels``: the most that any of them multiplies;
        KL(original ‖ model) in nats per token as it is (``kl``), with activations left alone
        (``kl_activations_off``), without its online rotations (``kl_r4_off``; None where there are none), and with
        no quantisation (``kl_unquantised``; None after GPTQ, which overwrites the weights). The last is not 0:
        SpinQuant centres the embedding, which RMSNorm does not undo.

    Raises:
        AssertionError: something is not active that should be.
    """
    window, logits_of = request["evaluation"][0], model_logits(model)
    reference = model_logits(original)(window)

    def kl() -> float:
        return float(kl_per_token(reference, logits_of(window)).mean())

    seen = levels_seen(model, logits_of, window)
    found: dict[str, Any] = {
        "layers": len(seen),
        "activation_levels": max(levels for levels, _ in seen.values()),
        "weight_levels": max(levels for _, levels in seen.values()),
        "r4_layers": len(online_rotations(model)),
        "kl": kl(),
        "kl_r4_off": None,
        "kl_unquantised": None,
    }
    with without_activation_quantisation(model):
        found["kl_activations_off"] = kl()
    if found["r4_layers"]:
        with without_online_rotations(model):
            found["kl_r4_off"] = kl()
    if request["rounding"] == "rtn":
        with without_quantisation(model):
            found["kl_unquantised"] = kl()
    blocks = model.config.num_hidden_layers
    assert found["layers"] == sum(isinstance(module, nn.Linear) for module in original.modules()) - 1, found
    assert found["activation_levels"] <= 2 ** request["a_bits"], found
    assert found["weight_levels"] <= 2**W_BITS, found
    assert found["kl_activations_off"] != found["kl"], found
    assert found["r4_layers"] == (blocks if request["transform"] == "rotate" else 0), found
    assert found["kl_r4_off"] is None or found["kl_r4_off"] > found["kl"], found
    return found


def main(path: str) -> None:
    """Quantise, take time and memory, then check and measure."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model = load(request["folder"])
    seconds = quantise_(model, request)
    peak_memory = peak_process_memory()
    original = load(request["folder"])
    windows = request["evaluation"]
    found = check(model, original, request)
    quality = measure(windows, live(windows, model_logits(model)), live(windows, model_logits(original)))
    result = {
        "seconds": seconds,
        "peak_memory": peak_memory,
        **asdict(quality),
        "checks": found,
        "versions": {**{name: version(name) for name in PACKAGES}, "python": platform.python_version()},
    }
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", metavar="REQUEST.json")
    main(parser.parse_args().request)
