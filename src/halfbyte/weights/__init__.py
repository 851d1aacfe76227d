"""Weight quantisers: how the codes of a layer are chosen. One file each, found by name."""

from __future__ import annotations

from halfbyte.weights.awq import AWQ
from halfbyte.weights.base import WeightQuantiser
from halfbyte.weights.gptq import GPTQ
from halfbyte.weights.rtn import RTN

QUANTISERS: dict[str, WeightQuantiser] = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ}
