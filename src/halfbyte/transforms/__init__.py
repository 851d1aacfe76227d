"""Function-preserving rewrites: the unquantised model says the same before and after."""

TRANSFORMS = ("smooth",)
