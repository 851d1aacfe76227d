"""Mistral: the Llama block under its own Hugging Face name; llama.cpp runs it as llama."""

from halfbyte.models.families import Family

FAMILY = Family(model_type="mistral", gguf_arch="llama", interleaved_rope=True)
