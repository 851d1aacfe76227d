"""Replace linear layers by their quantised simulation, and set what they compute with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from halfbyte.errors import HalfbyteError
from halfbyte.formats.int_group import GroupedWeight
from halfbyte.models.modules import linear
from halfbyte.numerics.affine import fake_quantise


class SharedInput:
    """Remembers the last quantised activation, so that q, k and v quantise their common input once."""

    def __init__(self) -> None:
        self._source: torch.Tensor | None = None
        self._key: tuple[int, bool] | None = None
        self._result: torch.Tensor | None = None

    def quantised(self, x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
        """``x`` fake-quantised per token; the result of the last call is reused for the same tensor object."""
        if self._source is x and self._key == (bits, symmetric) and self._result is not None:
            return self._result
        result = fake_quantise(x, bits, symmetric=symmetric)
        self._source, self._key, self._result = x, (bits, symmetric), result
        return result


class QuantLinear(nn.Module):
    """A linear layer on decoded weights, with activations quantised per token.

    Attributes:
        weight: decoded codes in the compute dtype, ``[out, in]``.
        a_bits: activation bits, or None to leave activations alone (W4A16).
        a_symmetric: symmetric activation codes.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, shared: SharedInput) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.shared = shared
        self.a_bits: int | None = None
        self.a_symmetric = False

    @property
    def in_features(self) -> int:
        """Length of an input row."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Length of an output row."""
        return self.weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        """Quantise the input if asked, then multiply."""
        if self.a_bits is not None:
            x = self.shared.quantised(x, self.a_bits, self.a_symmetric)
        return nn.functional.linear(x, self.weight, self.bias)


def replace_linear_(model: nn.Module, name: str, weight: GroupedWeight, shared: SharedInput) -> None:
    """Put a :class:`QuantLinear` with decoded ``weight`` where the linear layer ``name`` is.

    Raises:
        HalfbyteError: the shapes differ.
    """
    old = linear(model, name)
    if tuple(old.weight.shape) != tuple(weight.codes.shape):
        raise HalfbyteError(
            "codes do not fit the layer", where=name, expected=list(old.weight.shape), got=list(weight.codes.shape),
            fix="this plan was made for another model",
        )  # fmt: skip
    device, dtype = old.weight.device, old.weight.dtype
    decoded = GroupedWeight(weight.codes.to(device), weight.scales.to(device), weight.bits).decode().to(dtype)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, QuantLinear(decoded, old.bias, shared))


def set_activation_bits_(model: nn.Module, bits: Mapping[str, int | None], *, symmetric: bool = False) -> None:
    """Set the activation bits of quantised layers by name."""
    for name, width in bits.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear), name
        layer.a_bits, layer.a_symmetric = width, symmetric


def set_parameters_(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Overwrite parameters by name (folded norms and biases).

    Raises:
        HalfbyteError: the model has no such parameter, or of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        target = parameters.get(name)
        if target is None or target.shape != value.shape:
            raise HalfbyteError(
                "parameter does not fit the model", where=name, fix="this plan was made for another model"
            )
        with torch.no_grad():
            target.copy_(value)
