"""A copy of a model whose widths are multiples of 128: the same function, with channels and heads of zeros added.

    python benchmarks/widened.py --model demo --output DIR [--dtype fp32|bf16]

vLLM's kernels for Hopper want inputs and outputs that are multiples of 128, and SmolLM2-135M has 576 channels and nine
heads. Here the residual stream gets channels that are always zero (a norm divides by the root mean square over more
channels, so its scale and epsilon are made smaller), and attention gets heads of zeros, as many per key and value head
as there were. The answers stay the same in fp32.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from unaligned import write_copy

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import head_dim

MULTIPLE = 128


def up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def widened(source: SourceModel) -> nn.Module:
    """The wider model, with the old parameters in the corner of the new ones.

    Raises:
        HalfbyteError: a width that only whole MLP channels could fill.
    """
    old, config = source.model, copy.deepcopy(source.config)
    size, per_head = head_dim(config), config.num_attention_heads // config.num_key_value_heads
    if config.intermediate_size % MULTIPLE:
        raise HalfbyteError(f"{source.origin.model_id}: MLP channels are no multiple of {MULTIPLE}")
    hidden, pairs = config.hidden_size, config.num_key_value_heads
    while any(heads * size % MULTIPLE for heads in (pairs * per_head, pairs * (per_head + 2))):
        pairs += 1
    config.num_key_value_heads, config.num_attention_heads = pairs, pairs * per_head
    config.head_dim = size
    config.hidden_size = max(up(hidden, MULTIPLE), pairs * per_head * size)  # which transformers wants to be a multiple
    share = hidden / config.hidden_size  # of the channels that are not zero
    config.rms_norm_eps *= share
    new = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    known = dict(old.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            value = known[name].float()
            parameter.zero_()
            parameter[tuple(slice(0, length) for length in value.shape)] = value
            if name.endswith("norm.weight") or name == f"{source.family.final_norm}.weight":
                parameter.mul_(math.sqrt(share))
    return new.eval()


def widen_(source: SourceModel, _: argparse.Namespace) -> str:
    """Put the wider model in the place of the model."""
    source.model = widened(source)
    return f"{source.model.config.hidden_size} channels"


def main() -> int:
    """Make the copy, check that it says the same, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="Hugging Face id, local folder, .gguf file, or demo")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    return write_copy(parser, widen_, dtype="bf16")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HalfbyteError as error:
        sys.exit(str(error))
