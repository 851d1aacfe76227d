"""Fast twins of slow loops, for CUDA through Triton; each beside its torch reference."""
