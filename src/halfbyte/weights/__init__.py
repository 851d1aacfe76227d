"""Weight quantisers: how the codes of a layer are chosen. One file each, found by name."""

from __future__ import annotations

from halfbyte.weights.rtn import round_to_nearest

QUANTISERS = {"rtn": round_to_nearest}
