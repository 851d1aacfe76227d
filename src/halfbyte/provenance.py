"""What made a number: versions, device, number format."""

from __future__ import annotations

import platform

import torch
import transformers

import halfbyte
from halfbyte.models.device import device_name
from halfbyte.models.loading import SourceModel


def made_with(source: SourceModel) -> dict[str, str]:
    """Package versions, and what ``source`` computes on and in, in this process."""
    return {
        "halfbyte": halfbyte.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device_name(source.device),
        "dtype": str(source.dtype).removeprefix("torch."),
    }
