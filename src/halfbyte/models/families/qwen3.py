"""Qwen3: q and k are normalised head by head after their projections; no biases."""

from halfbyte.models.families import Family

FAMILY = Family(model_type="qwen3", gguf_arch="qwen3")
