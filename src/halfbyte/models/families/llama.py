"""Llama and its relatives (SmolLM2, TinyLlama): no biases, rotary pairs interleaved in GGUF files."""

from halfbyte.models.families import Family

FAMILY = Family(model_type="llama", gguf_arch="llama", interleaved_rope=True)
