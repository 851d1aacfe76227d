"""Function-preserving rewrites: the unquantised model says the same before and after.

Which of them a target can run is decided here, before a search starts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Transform:
    """A rewrite that can be asked for with ``--transforms``.

    Attributes:
        about: what it does, for help texts.
        targets: where the result can run.
        on_request: where it can run too, at a price that has to be asked for (``--online_transforms``).
    """

    about: str
    targets: tuple[str, ...]
    on_request: tuple[str, ...] = ()
    needs_untied_head: bool = False

    order: int = 0

    @property
    def at_run_time(self) -> bool:
        """Whether it changes the input of layers when the model runs; otherwise it is folded into the weights."""
        return self.targets == ("sim",)


TRANSFORMS = {
    "smooth": Transform("channel scales folded into norms, v→o and up→down, chosen per unit", ("sim", "gguf", "vllm")),
    "r1": Transform("rotation of the residual stream, folded", ("sim", "gguf", "vllm"), needs_untied_head=True),
    "r2": Transform("rotation of every head between v and o, folded", ("sim", "gguf", "vllm")),
    "r3": Transform("rotation of q and k after the rotary embedding, at run time", ("sim",)),
    "r4": Transform("rotation in front of down_proj, at run time", ("sim",), on_request=("vllm",)),
    "online": Transform("rotation in front of every linear layer, at run time", ("sim",)),
    "learned": Transform("low-rank affine transform in front of every linear layer, at run time", ("sim",)),
}
for _order, (_name, _transform) in enumerate(TRANSFORMS.items()):
    object.__setattr__(_transform, "order", _order)
