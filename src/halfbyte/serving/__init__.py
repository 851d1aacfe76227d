"""What a compressed-tensors folder is computed as where it is served, and how to check it."""

from halfbyte.serving.table import serving_markdown, serving_table

__all__ = ["serving_markdown", "serving_table"]
