"""Qwen2 and Qwen2.5: q, k and v carry biases; the small ones tie the output head to the embedding."""

from halfbyte.models.families import Family

FAMILY = Family(model_type="qwen2", gguf_arch="qwen2")
