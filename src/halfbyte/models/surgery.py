"""Replace linear layers by their quantised simulation, and set what they compute with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.errors import HalfbyteError
from halfbyte.formats.int_group import GroupedWeight
from halfbyte.kernels.activations import fake_quantise_rows
from halfbyte.models.modules import linear
from halfbyte.numerics.balance import LowRank
from halfbyte.numerics.hadamard import rotate

Bits = int | torch.Tensor | None  # activation bits: for all, int32 [rows] for a batch [rows, ...], or not rounded


@dataclass(frozen=True, eq=False)
class InputScheme:
    """What happens to a layer's input before it is multiplied; layers that share an input share one scheme object.

    Attributes:
        rotated: it is rotated at run time (:mod:`halfbyte.numerics.hadamard`); the weights are stored for that.
        low_rank: a correction at run time, before the rotation; the weights are stored for that.
        a4_clip: share of a token's range that 4-bit codes span; 8-bit codes span all of it.
        symmetric: symmetric codes.
    """

    rotated: bool = False
    low_rank: LowRank | None = None
    a4_clip: float = 1.0
    symmetric: bool = False

    @property
    def changes_input(self) -> bool:
        """Whether the layer's weights are stored for another input than the model's."""
        return self.rotated or self.low_rank is not None

    def transform(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., in]
        """The input that the stored weights expect, before rounding; fp32 if anything changes."""
        if self.low_rank is not None:
            x = self.low_rank.forward(x.float())
        return rotate(x) if self.rotated else x

    def stored_weight(self, weight: torch.Tensor) -> torch.Tensor:  # [out, in] -> [out, in]
        """``weight`` for the transformed input, fp32: the product stays the same."""
        weight = weight.float()
        if self.low_rank is not None:
            weight = self.low_rank.backward(weight)
        return rotate(weight) if self.rotated else weight

    def rounded(self, x: torch.Tensor, bits: Bits) -> torch.Tensor:
        """A transformed input as its codes stand for it."""
        if bits is None:
            return x
        return fake_quantise_rows(x, bits, a4_clip=self.a4_clip, symmetric=self.symmetric)


class SharedInput:
    """Remembers the last treated activation, so that q, k and v treat their common input once."""

    def __init__(self) -> None:
        self._source: torch.Tensor | None = None
        self._bits: Bits = None
        self._scheme: InputScheme | None = None
        self._result: torch.Tensor | None = None

    def treated(self, x: torch.Tensor, bits: Bits, scheme: InputScheme) -> torch.Tensor:
        """``scheme`` applied to ``x``; the result of the last call is reused for the same objects."""
        same = self._source is x and self._bits is bits and self._scheme is scheme
        if not same or self._result is None:
            self._source, self._bits, self._scheme = x, bits, scheme
            self._result = scheme.rounded(scheme.transform(x), bits).to(x.dtype)
        return self._result


class QuantLinear(nn.Module):
    """A linear layer on decoded weights, with activations quantised per token.

    Attributes:
        weight: decoded codes in the compute dtype, ``[out, in]``.
        scheme: what happens to the input.
        a_bits: activation bits: one number, one for each row of a batch, or None to leave activations alone (W4A16).
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scheme: InputScheme, shared: SharedInput
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scheme, self.shared = scheme, shared
        self.a_bits: Bits = None

    @property
    def in_features(self) -> int:
        """Length of an input row."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Length of an output row."""
        return self.weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        """Treat the input, then multiply."""
        if self.a_bits is not None or self.scheme.changes_input:
            x = self.shared.treated(x, self.a_bits, self.scheme)
        return nn.functional.linear(x, self.weight, self.bias)


def replace_linear_(
    model: nn.Module, name: str, weight: GroupedWeight, shared: SharedInput, scheme: InputScheme | None = None
) -> None:
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
    setattr(model.get_submodule(parent), leaf, QuantLinear(decoded, old.bias, scheme or InputScheme(), shared))


def set_activation_bits_(model: nn.Module, bits: Mapping[str, Bits]) -> None:
    """Set the activation bits of quantised layers by name; layers that share an input share the object."""
    for name, width in bits.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear), name
        layer.a_bits = width


def set_parameters_(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Overwrite parameters by name (folded norms and biases, a rotated embedding).

    A value for an output head that is tied to the embedding unties it.

    Raises:
        HalfbyteError: the model has no such parameter, or of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in values.items():
        target = parameters.get(name)
        if target is None or target.shape != value.shape:
            raise HalfbyteError(
                "parameter does not fit the model", where=name, fix="this plan was made for another model"
            )
        if any(other is target for known, other in parameters.items() if known != name):
            parent, _, leaf = name.rpartition(".")
            target = nn.Parameter(torch.empty_like(target), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, target)
            parameters[name] = target
        with torch.no_grad():
            target.copy_(value)
