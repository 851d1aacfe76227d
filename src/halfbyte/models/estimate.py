"""How much memory a model will need, said before the work starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from halfbyte.errors import HalfbyteError
from halfbyte.models.archs import Family
from halfbyte.models.device import available_memory
from halfbyte.models.loading import layers_of
from halfbyte.spec import Layer

HEAD_CHUNK_TOKENS = 256  # tokens whose logits exist at once, in four fp32 copies


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a search needs.

    Attributes:
        device: weights in the compute dtype, activations and logits, where the model runs.
        preparation: one block at a time with its statistics, where it is quantised, before the model is there.
        host: main memory beside an accelerator: the W4 codes, one byte each while they are being chosen, the weights,
            and the W4 simulation that replaces them.
        parameters, linear_parameters: how many weights there are, and how many of them get 4 bits.
    """

    device: int
    host: int
    parameters: int
    linear_parameters: int
    preparation: int = 0

    def on(self, device: torch.device) -> int:
        """Bytes on ``device``: on an accelerator one stage after the other, otherwise one memory for everything."""
        if device.type == "cuda":
            return max(self.device, self.preparation)
        return self.device + self.preparation + self.linear_parameters


def estimate_search(
    config: PretrainedConfig, family: Family, dtype: torch.dtype, tokens: int, ctx: int, *, gradients: bool = False
) -> MemoryEstimate:
    """Estimate from the configuration alone; no weights are read.

    Args:
        tokens: the larger of calibration and search tokens.
        ctx: tokens per window.
        gradients: the loss is differentiated (``--fitness fisher``), so every block's activations are kept.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = layers_of(model, family)
    linear = sum(layer.macs for layer in layers)
    width = 2 if dtype == torch.bfloat16 else 4
    hidden, vocab = config.hidden_size, config.vocab_size
    logits = 4 * 4 * HEAD_CHUNK_TOKENS * vocab
    if gradients:
        per_token = config.num_hidden_layers * (10 * hidden + 5 * config.intermediate_size)
        logits = ctx * (width * per_token + 3 * 4 * vocab)
    search = width * parameters + 3 * width * tokens * hidden + 8 * 4 * ctx * config.intermediate_size + logits
    return MemoryEstimate(
        device=search,
        preparation=_preparation(config, layers, tokens),
        host=linear + 2 * width * parameters,
        parameters=parameters,
        linear_parameters=linear,
    )


def _preparation(config: PretrainedConfig, layers: list[Layer], tokens: int) -> int:
    """Bytes for one block and its statistics, all in fp32: two copies, both streams of hidden states, what is seen of
    inputs, and for the widest layer its Hessian (twice, a factor and its workspace) and eight matrices like its weight.
    """
    block = [layer for layer in layers if layer.block == 0]
    widest = max(layer.in_features for layer in block)
    seen = tokens * (3 * config.hidden_size + widest)
    matrices = 8 * max(layer.macs for layer in block)
    copies = 2 * sum(layer.macs for layer in block)
    return 4 * (copies + 4 * tokens * config.hidden_size + seen + 4 * widest**2 + matrices)


def estimate_load(
    config: PretrainedConfig, family: Family, dtype: torch.dtype, *, with_codes: bool = False
) -> MemoryEstimate:
    """What it takes to load a model and run it; ``with_codes``: and to become the simulation of a plan."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    codes = sum(layer.macs for layer in layers_of(model, family)) if with_codes else 0
    width = 2 if dtype == torch.bfloat16 else 4
    return MemoryEstimate(int(1.1 * width * parameters), width * parameters + codes, parameters, codes)


def check_memory(estimate: MemoryEstimate, device: torch.device) -> None:
    """Refuse, before the work, what cannot fit.

    Raises:
        HalfbyteError: saying how much is needed and how much there is.
    """
    needs = {device: estimate.on(device)}
    if device.type == "cuda":
        needs[torch.device("cpu")] = estimate.host
    for where, need in needs.items():
        there = available_memory(where)
        if need > there:
            raise HalfbyteError(
                f"too little memory on {where.type}", where="memory estimate", expected=f"{need / 1e9:.1f} GB",
                got=f"{there / 1e9:.1f} GB free",
                fix="close other programs, use --dtype bf16, fewer tokens, or a smaller model",
            )  # fmt: skip
