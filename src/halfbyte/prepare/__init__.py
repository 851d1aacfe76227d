"""From a loaded model to its W4 simulation: transforms, codes, layer sensitivity, block by block."""
