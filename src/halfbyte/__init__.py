"""halfbyte: mixed-precision post-training quantisation of large language models, half a byte per weight."""

__version__ = "0.1.0"
