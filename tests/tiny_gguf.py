"""What the llama.cpp tests share: a random Llama written with gguf-py alone."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WIDTH, INNER, VOCAB, BLOCKS, HEADS, KV_HEADS = 256, 512, 96, 3, 4, 2


def write_tiny_gguf(path: Path) -> None:
    """A random Llama of three blocks whose rows divide by 256, in float32, without a tokenizer (7 MB)."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")

    def add(name: str, *shape: int) -> None:
        weight = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) / np.sqrt(shape[-1])
        writer.add_tensor(name, weight.astype(np.float32))

    add("token_embd.weight", VOCAB, WIDTH)
    add("output_norm.weight", WIDTH)
    kv_width = WIDTH // HEADS * KV_HEADS
    for block in range(BLOCKS):
        for name, *shape in (
            ("attn_norm", WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", kv_width, WIDTH),
            ("attn_v", kv_width, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_norm", WIDTH),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            add(f"blk.{block}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
