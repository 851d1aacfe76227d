"""The input of every linear layer is rotated at run time; the weights are stored for it."""

from __future__ import annotations

from halfbyte.transforms import Transform, UnitStep
from halfbyte.transforms._rotation import rotate_input_


class Online(Transform):
    """See the module."""

    order = 50
    at_run_time = True

    def treat_input_(self, unit: UnitStep) -> None:
        """Rotate it."""
        rotate_input_(unit)


TRANSFORM = Online()
