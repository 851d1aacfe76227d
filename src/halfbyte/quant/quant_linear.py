"""Replace linear layers by their quantised simulation, and set what they compute with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.precision import products
from halfbyte.quant.arithmetics import ARITHMETICS, Arithmetic
from halfbyte.quant.balance import LowRank
from halfbyte.quant.grids import Grid
from halfbyte.quant.hadamard import rotate, rotate_blocks
from halfbyte.quant.int4 import GroupedWeight, PackedWeight, decode_packed

Bits = int | torch.Tensor | None  # activation bits: for all, int32 [rows] for a batch [rows, ...], or not rounded


@dataclass(frozen=True, eq=False)
class InputScheme:
    """What happens to a layer's input before it is multiplied; layers that share an input share one scheme object.

    Attributes:
        rotated: it is rotated at run time (:mod:`halfbyte.quant.hadamard`); the weights are stored for that.
        low_rank: a correction at run time, before the rotation; the weights are stored for that.
        a4_clip: share of a token's range that 4-bit codes span; 8-bit codes span all of it.
        symmetric: symmetric codes.
        block: channels that are rotated together, the same way in every block; 0 if all of them are.
        arithmetic: name of the rule by which inputs are rounded and codes decoded (:mod:`halfbyte.quant.arithmetics`).
        group: channels whose codes share a scale, where the arithmetic has groups; 0 if all of a token's do.
        scale: what the arithmetic multiplies all group scales with before it rounds them, if it does.
    """

    rotated: bool = False
    low_rank: LowRank | None = None
    a4_clip: float = 1.0
    symmetric: bool = False
    block: int = 0
    arithmetic: str = "per_token"
    group: int = 0
    scale: float = 0.0

    @cached_property
    def rule(self) -> Arithmetic:
        """What the layer is computed as."""
        return ARITHMETICS[self.arithmetic]

    @property
    def changes_input(self) -> bool:
        """Whether the layer's weights are stored for another input than the model's."""
        return self.rotated or self.low_rank is not None

    def transform(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., in]
        """The input that the stored weights expect, before rounding; fp32 if anything changes."""
        if x.dtype != torch.bfloat16:
            return self._transformed(x)
        with products(exact=False):  # still finer than the input
            return self._transformed(x)

    def _transformed(self, x: torch.Tensor) -> torch.Tensor:
        if self.low_rank is not None:
            x = self.low_rank.forward(x.float())
        return self._turned(x) if self.rotated else x

    @products(exact=True)
    def stored_weight(self, weight: torch.Tensor) -> torch.Tensor:  # [out, in] -> [out, in]
        """``weight`` for the transformed input, fp32: the product stays the same."""
        weight = weight.float()
        if self.low_rank is not None:
            weight = self.low_rank.backward(weight)
        return self._turned(weight) if self.rotated else weight

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return rotate_blocks(x, self.block) if self.block else rotate(x)

    def rounded(self, x: torch.Tensor, bits: Bits) -> torch.Tensor:
        """A transformed input as its codes stand for it."""
        return x if bits is None else self.rule.rounded(x, bits, self)

    def treated(self, x: torch.Tensor, bits: Bits) -> torch.Tensor:
        """``x`` transformed and rounded; gradients pass through the rounding as if there were none."""
        x = self.transform(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.rounded(x, bits)
        plain = x.detach()
        return x + (self.rounded(plain, bits) - plain)


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
            self._result = scheme.treated(x, bits).to(x.dtype)
        return self._result


class QuantLinear(nn.Module):
    """A linear layer on decoded weights, with activations quantised per token.

    Args:
        own: activation bits -> decoded codes, for those bits with which the scheme's arithmetic decodes otherwise.

    Attributes:
        weight: decoded codes in the compute dtype, ``[out, in]``.
        scheme: what happens to the input.
        a_bits: activation bits: one number, one for each row of a batch, or None to leave activations alone (W4A16).
    """

    weight: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scheme: InputScheme,
        shared: SharedInput,
        own: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        if weight is not None:  # a subclass may have it in another form
            self.weight = nn.Parameter(weight, requires_grad=False)
        for bits, value in (own or {}).items():
            self.register_buffer(_own_name(bits), value)
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
        bits, own = self.a_bits, self.scheme.rule.own_weights
        if not own or bits is None:
            return self._multiply(x)
        if isinstance(bits, int):
            return self._multiply_own(x, bits) if bits in own else self._multiply(x)
        result = self._multiply(x)
        chosen = bits.view(-1, *[1] * (x.dim() - 1))  # [rows, 1, ..., 1]
        for width in own:
            result = torch.where(chosen == width, self._multiply_own(x, width), result)
        return result

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def _multiply_own(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        """The product with the weights that inputs of so many bits are multiplied with."""
        return nn.functional.linear(x, self.get_buffer(_own_name(bits)), self.bias)


class PackedLinear(QuantLinear):
    """The same numbers from packed codes, which every multiplication decodes anew: a quarter of bf16's memory.

    Attributes:
        packed, scales, grid: see :class:`halfbyte.quant.int4.PackedWeight`; the tensors are buffers.
        dtype: what is decoded to, the compute dtype.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        scheme: InputScheme,
        shared: SharedInput,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(None, bias, scheme, shared)
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scales", weight.scales)
        self.grid, self.dtype = weight.grid, dtype

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Decoded at every access, ``[out, in]``."""
        return decode_packed(self.packed, self.scales, self.dtype, grid=self.grid)

    @property
    def in_features(self) -> int:
        """Length of an input row."""
        return 2 * self.packed.shape[1]

    @property
    def out_features(self) -> int:
        """Length of an output row."""
        return self.packed.shape[0]

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return _DecodedProduct.apply(x, self.packed, self.scales, self.bias, self.dtype, self.grid)

    def _multiply_own(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        weight = self.scheme.rule.decoded(PackedWeight(self.packed, self.scales, self.grid).unpack(), bits)
        return nn.functional.linear(x, weight.to(self.dtype), self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """What ``.to()`` calls: a change of dtype is one of the compute dtype; the scales are fp16 whatever that is."""
        known = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != known.dtype:
            self.dtype, self.scales = self.scales.dtype, known.to(self.scales.device)
        return self


class _DecodedProduct(torch.autograd.Function):
    """x Wᵀ + b that keeps the codes for the gradient of x, not the decoded weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        packed: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        grid: Grid,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.dtype, ctx.grid = dtype, grid
        return nn.functional.linear(x, decode_packed(packed, scales, dtype, grid=grid), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        packed, scales = ctx.saved_tensors
        weight = decode_packed(packed, scales, ctx.dtype, grid=ctx.grid)
        return gradients[0] @ weight, None, None, None, None, None


def replace_linear_(
    model: nn.Module,
    name: str,
    weight: GroupedWeight | PackedWeight,
    shared: SharedInput,
    scheme: InputScheme | None = None,
    *,
    packed: bool = False,
) -> None:
    """Put a :class:`QuantLinear` with ``weight`` where the linear layer ``name`` is, on its device and in its dtype.

    Args:
        packed: keep the codes packed (:class:`PackedLinear`), for the same numbers from less memory.

    Raises:
        HalfbyteError: the shapes differ.
    """
    old = cast(nn.Linear, model.get_submodule(name))
    if (old.out_features, old.in_features) != weight.shape:
        raise HalfbyteError(
            f"{name}: codes do not fit the layer, expected {[old.out_features, old.in_features]}, "
            f"got {list(weight.shape)}",
            fix="this plan was made for another model",
        )
    device, dtype, scheme = old.weight.device, old.weight.dtype, scheme or InputScheme()
    weight = weight.to(device)
    if packed:
        codes = weight.pack() if isinstance(weight, GroupedWeight) else weight
        _put_(model, name, PackedLinear(codes, old.bias, scheme, shared, dtype))
        return
    if isinstance(weight, PackedWeight):
        decoded = decode_packed(weight.packed, weight.scales, dtype, grid=weight.grid)
    else:
        decoded = weight.decode().to(dtype)
    own = {}
    for bits in scheme.rule.own_weights:
        codes = weight.unpack() if isinstance(weight, PackedWeight) else weight
        own[bits] = scheme.rule.decoded(codes, bits).to(dtype)
    _put_(model, name, QuantLinear(decoded, old.bias, scheme, shared, own))


def _own_name(bits: int) -> str:
    return f"weight_a{bits}"


def pack_linear_(model: nn.Module, name: str, weight: PackedWeight) -> None:
    """Let the :class:`QuantLinear` ``name`` keep the codes that it was decoded from, where ``weight`` has them."""
    old = model.get_submodule(name)
    assert isinstance(old, QuantLinear), name
    new = PackedLinear(weight, old.bias, old.scheme, old.shared, old.weight.dtype)
    new.a_bits = old.a_bits
    _put_(model, name, new)


def _put_(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def set_activation_bits_(model: nn.Module, bits: Mapping[str, Bits]) -> None:
    """Set the activation bits of quantised layers by name; layers that share an input share the object."""
    for name, width in bits.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear), name
        layer.a_bits = width


def set_parameters_(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Replace parameters by name (folded norms and biases, a rotated embedding), on their device and in their dtype.

    A value that is there in that dtype already is not copied. One for an output head that is tied to the embedding, or
    for such an embedding, unties them.

    Raises:
        HalfbyteError: the model has no such parameter, or of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in values.items():
        known = parameters.get(name)
        if known is None or known.shape != value.shape:
            raise HalfbyteError(f"{name}: parameter does not fit the model", fix="this plan was made for another model")
        _put_(model, name, nn.Parameter(value.to(known.device, known.dtype), requires_grad=False))
