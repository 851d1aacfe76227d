"""halfbyte: mixed-precision post-training quantisation of large language models, half a byte per weight."""

# The package first: below, the function takes its name. ``from halfbyte.evaluate.quality import …`` works all the same.
import halfbyte.evaluate  # noqa: F401
from halfbyte.api import Quantized, compare, evaluate, export, load_plan, quantize, simulate
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.progress import listening

__version__ = "0.1.0"
__all__ = [
    "HalfbyteError",
    "Quantized",
    "compare",
    "evaluate",
    "export",
    "listening",
    "load_plan",
    "quantize",
    "simulate",
]
