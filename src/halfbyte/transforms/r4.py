"""R4: the input of down_proj is rotated at run time; the weights are stored for it."""

from __future__ import annotations

from halfbyte.transforms import Transform, UnitStep
from halfbyte.transforms._rotation import rotate_input_


class R4(Transform):
    """See the module."""

    order = 40
    at_run_time = True

    def treat_input_(self, unit: UnitStep) -> None:
        """Rotate what down_proj reads."""
        if unit.group[0] == unit.family.down:
            rotate_input_(unit)


TRANSFORM = R4()
