"""What llama.cpp must know about the architecture: from a Hugging Face config, or copied from a GGUF file.

Source of the keys: the GGUF specification (ggml, docs/gguf.md) and what llama.cpp's llama-model.cpp reads. Rotary
scaling follows ``transformers.modeling_rope_utils``, which the simulation runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, RopeScalingType
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.modules import head_dim

ROPE_FREQS = "rope_freqs.weight"
# About the file that was read, not about the model; the writer says its own. The reader shows the header as `GGUF.`.
NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
NOT_COPIED += ("split.", "quantize.", "halfbyte.")
YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # these graphs do not read the keys for them


def copy_keys_(writer: GGUFWriter, reader: GGUFReader) -> None:
    """Copy the metadata of a GGUF file, architecture and tokenizer included, byte for byte."""
    for key, field in reader.fields.items():
        if key.startswith(NOT_COPIED):
            continue
        kind, element = field.types[0], field.types[-1]
        if kind == GGUFValueType.ARRAY:
            if len(field.data) == 0:  # the writer has no empty arrays; a missing key means the same
                continue
            parts = [field.parts[index] for index in field.data]
            value: Any = [bytes(part) if element == GGUFValueType.STRING else part[0].item() for part in parts]
            writer.add_key_value(key, value, kind, sub_type=element)
        elif kind == GGUFValueType.STRING:
            writer.add_key_value(key, bytes(field.parts[-1]), kind)
        else:
            writer.add_key_value(key, field.contents(), kind)


def add_hparams_(writer: GGUFWriter, config: PretrainedConfig, *, where: object) -> None:
    """Add the architecture keys of ``config`` to ``writer``, under the writer's ``general.architecture``.

    A sliding window is written, but llama.cpp's llama and qwen graphs attend to the whole context: they agree with
    the model up to that many tokens.

    Raises:
        HalfbyteError: an activation function or a rotary scaling that llama.cpp does not compute for these families.
    """
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise HalfbyteError(f"{where}: activation function is not llama.cpp's, expected silu, got {activation}")
    head = head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if writer.arch == "qwen3" or head * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(window)
    _add_rope_(writer, config, where)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _add_rope_(writer: GGUFWriter, config: PretrainedConfig, where: object) -> None:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _add_yarn_(writer, config, rope, where)
    elif kind != "default" and not (kind == "llama3" and writer.arch == "llama"):  # a tensor, rope_frequency_factors
        known = "default, linear, yarn" + (" or llama3" if writer.arch == "llama" else "")
        raise HalfbyteError(
            f"{where}: llama.cpp's {writer.arch} has no such rotary scaling, expected {known}, got {kind}"
        )


def _add_yarn_(writer: GGUFWriter, config: PretrainedConfig, rope: dict[str, Any], where: object) -> None:
    """YaRN (https://arxiv.org/abs/2309.00071). llama.cpp multiplies its own 0.1 ln s + 1 by ``attn_factor``."""
    unread = {key: rope.get(key) for key, usual in YARN_FIXED.items() if rope.get(key) not in (None, usual)}
    if unread:
        raise HalfbyteError(f"{where}: llama.cpp has its own YaRN constants, expected {YARN_FIXED}, got {unread}")
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))[1]
    usual = 0.1 * math.log(factor) + 1.0
    if not math.isclose(attention, usual, rel_tol=1e-6):
        writer.add_rope_scaling_attn_factors(attention / usual)


def rope_frequency_factors(config: PretrainedConfig) -> torch.Tensor | None:
    """The tensor ``rope_freqs.weight``, fp32 ``[rotary dims / 2]``, by which llama.cpp divides each rotary frequency.

    Only Llama 3's scaling needs it; None otherwise.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].float()  # [dims / 2]
    dims = 2 * scaled.numel()
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    return plain / scaled
