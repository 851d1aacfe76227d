"""Storage formats: encode, decode and bits per weight, as pure functions over one module's tensors."""
