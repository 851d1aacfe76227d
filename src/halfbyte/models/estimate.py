"""How much memory a model will need, said before the work starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from halfbyte.errors import HalfbyteError
from halfbyte.models.archs import Family
from halfbyte.models.device import available_memory
from halfbyte.models.loading import layers_of

HEAD_CHUNK_TOKENS = 256  # tokens whose logits exist at once, in four fp32 copies


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a search needs.

    Attributes:
        device: weights in the compute dtype, activations and logits, where the model runs.
        host: what stays in main memory beside them: the W4 codes, one byte each while they are being chosen, and the
            weights while they are being read.
        parameters, linear_parameters: how many weights there are, and how many of them get 4 bits.
    """

    device: int
    host: int
    parameters: int
    linear_parameters: int


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
    linear = sum(layer.macs for layer in layers_of(model, family))
    width = 2 if dtype == torch.bfloat16 else 4
    hidden, vocab = config.hidden_size, config.vocab_size
    block = 3 * 4 * linear // config.num_hidden_layers
    activations = 3 * width * tokens * hidden + 8 * 4 * ctx * config.intermediate_size
    logits = 4 * 4 * HEAD_CHUNK_TOKENS * vocab
    if gradients:
        per_token = config.num_hidden_layers * (10 * hidden + 5 * config.intermediate_size)
        logits = ctx * (width * per_token + 3 * 4 * vocab)
    return MemoryEstimate(
        device=width * parameters + block + activations + logits,
        host=linear + width * parameters,
        parameters=parameters,
        linear_parameters=linear,
    )


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
    needs = {device: estimate.device}
    if device.type == "cuda":
        needs[torch.device("cpu")] = estimate.host
    else:  # one memory for both
        needs[device] += estimate.linear_parameters
    for where, need in needs.items():
        there = available_memory(where)
        if need > there:
            raise HalfbyteError(
                f"too little memory on {where.type}", where="memory estimate", expected=f"{need / 1e9:.1f} GB",
                got=f"{there / 1e9:.1f} GB free",
                fix="close other programs, use --dtype bf16, fewer tokens, or a smaller model",
            )  # fmt: skip
