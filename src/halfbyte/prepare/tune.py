"""Fit what a W4 format leaves free to the whole model's KL: scales of groups, norms and biases; codes stay as they are.

Gradient descent through the plan's simulation on KL(original ‖ plan) of calibration text. Rounding of inputs passes
gradients on (straight-through; Bengio et al. 2013, arXiv:1308.3432). What is fitted costs nothing at run time. After
the second phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062), with norms (Li et al. 2023, Norm Tweaking,
arXiv:2309.02784) and the original as a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from halfbyte.calibration.walk import capture
from halfbyte.core.progress import report
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import blocks, linear
from halfbyte.plan import Codes
from halfbyte.quant.int4 import PackedWeight, ScaleRule, decode_packed
from halfbyte.quant.quant_linear import Bits, QuantLinear, set_activation_bits_
from halfbyte.search.reference import CHUNK_TOKENS, CHUNK_TOKENS_ELSEWHERE, Reference

STAGE = "tune"
BATCH_TOKENS = 4096  # of a step
RATE = 1e-3  # of Adam: the largest step of a scale, relative to it
BETAS = (0.9, 0.99)
WARM_UP = 8  # steps
CHECKED = 16  # steps between two looks at the other text


@dataclass(frozen=True)
class Judged:
    """A text and what the unquantised model answers.

    Attributes:
        tokens: int64 ``[windows, length]``.
        answers: to the same windows; on any device.
    """

    tokens: torch.Tensor
    answers: Reference


def tuned_codes(
    source: SourceModel,
    codes: Codes,
    bits: Mapping[str, Bits],
    rule: ScaleRule,
    text: Judged,
    other: Judged,
    *,
    steps: int,
    seed: int,
) -> Codes | None:
    """The codes with scales and parameters that lose least on ``other``; None if none lose less than what they were.

    Values that are not finite end it with the parameter's name; what was best until then counts.

    Args:
        source: the model as it is simulated with ``codes`` on its device; it cannot be used afterwards.
        bits: the plan's activation bits, by layer.
        rule: what a scale may be.
        text: to descend on.
        other: to choose by, every few steps.
        steps: of about ``BATCH_TOKENS`` tokens.
        seed: of the order of windows.
    """
    set_activation_bits_(source.model, bits)
    tuning = _Tuning(source, codes, rule)
    here, there = tuning.inputs(text), tuning.inputs(other)
    optimiser = torch.optim.Adam(tuning.groups(), betas=BETAS)
    rates = [group["lr"] for group in optimiser.param_groups]
    generator = torch.Generator().manual_seed(seed)
    size = max(1, BATCH_TOKENS // text.tokens.shape[1])
    waiting: list[torch.Tensor] = []
    best, first = None, tuning.mean_kl(there)
    least = first
    for step in range(steps):
        waiting = waiting or list(torch.randperm(len(text.tokens), generator=generator).split(size))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.zero_grad()
        tuning.kl(here, waiting.pop(0)).backward()
        broken = tuning.not_finite()
        if broken:
            report(STAGE, steps, steps, f"stopped in step {step + 1}: the gradient of {broken} is not finite")
            break
        optimiser.step()
        if (step + 1) % CHECKED == 0 or step + 1 == steps:
            loss = tuning.mean_kl(there)
            if loss < least:
                best, least = tuning.codes(), loss
        report(STAGE, step + 1, steps, f"KL on the search text {first:.4g} -> {least:.4g}")
    return best


class _TunedLinear(nn.Module):
    """A :class:`QuantLinear` whose scales are ``known · (1 + change)``, as the rule rounds them.

    Args:
        layer: it stands for.
        weight: its codes.
        rule: what a scale may be.
    """

    def __init__(self, layer: QuantLinear, weight: PackedWeight, rule: ScaleRule, device: torch.device) -> None:
        super().__init__()
        self.scheme, self.shared, self.a_bits, self.bias = layer.scheme, layer.shared, layer.a_bits, layer.bias
        self.rule, self.packed = rule, weight.to(device)
        self.change = nn.Parameter(torch.zeros(weight.scales.shape, device=device))  # fp32 [out, groups]

    def scales(self) -> torch.Tensor:
        """As they are stored, fp16 ``[out, groups]``."""
        known = self.packed.scales
        return self.rule.fitted(self.rule.rounded(known.float() * (1 + self.change.detach())), known=known)

    def decoded(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight that inputs are multiplied with, ``[out, in]`` in ``dtype``, and its scales, fp16."""
        scales, packed = self.scales(), self.packed
        if isinstance(self.a_bits, int) and self.a_bits in self.scheme.rule.own_weights:
            codes = PackedWeight(packed.packed, scales, packed.grid).unpack()
            return self.scheme.rule.decoded(codes, self.a_bits).to(dtype), scales
        return decode_packed(packed.packed, scales, dtype, grid=packed.grid), scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        """As :meth:`QuantLinear.forward`."""
        if self.a_bits is not None or self.scheme.changes_input:
            x = self.shared.treated(x, self.a_bits, self.scheme)
        y = _Product.apply(x, self.change, self)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ with a gradient for the scales of W, which is decoded anew for each use."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: torch.Tensor, layer: _TunedLinear) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.decoded(x.dtype)[0].T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (x,), layer, gradient = ctx.saved_tensors, ctx.layer, gradients[0]
        weight, scales = layer.decoded(x.dtype)
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # [out, in]
        of_scaled = (of_weight.mul_(weight)).view(*scales.shape, -1).sum(-1, dtype=torch.float32)  # times the scale
        ratio = torch.where(scales == 0, torch.zeros_like(scales), layer.packed.scales / scales)
        return gradient @ weight, of_scaled * ratio.float(), None


@dataclass(frozen=True)
class _Inputs:
    """A text as it goes into the first block, ``[windows, length, hidden]``, the other arguments, and the answers."""

    hidden: torch.Tensor
    kwargs: Mapping[str, Any]
    answers: Reference


class _Tuning:
    """The simulation with everything that is free as a parameter."""

    def __init__(self, source: SourceModel, codes: Codes, rule: ScaleRule) -> None:
        self.model, self.family, self.known = source.model, source.family, codes
        self.head = linear(source.model, source.family.head).weight.detach()
        self.layers: dict[str, _TunedLinear] = {}
        for name, weight in codes.weights.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, QuantLinear), name
            self.layers[name] = _TunedLinear(layer, weight, rule, self.head.device)
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.layers[name])
        self.model.requires_grad_(False)
        self.free: dict[str, nn.Parameter] = {}  # in fp32
        for name, parameter in self.model.named_parameters():
            if name.endswith(".change"):
                parameter.requires_grad = True
                self.free[name] = parameter
            elif name.startswith((f"{self.family.blocks}.", f"{self.family.final_norm}.")):
                self.free[name] = nn.Parameter(parameter.detach().float().clone())

    def groups(self) -> list[dict[str, Any]]:
        """For the optimiser: a step is relative to the mean size of what it changes, which is 1 for factors."""
        sizes = {
            name: 1.0 if name.endswith(".change") else float(parameter.detach().abs().mean())
            for name, parameter in self.free.items()
        }
        return [{"params": [parameter], "lr": RATE * sizes[name]} for name, parameter in self.free.items()]

    def not_finite(self) -> str:
        """The name of a parameter whose gradient is not, of several the last in the model, where they come from."""
        sums = {name: value.grad.abs().sum() for name, value in self.free.items() if value.grad is not None}
        finite = torch.stack(list(sums.values())).isfinite().tolist()
        bad = [name for name, fine in zip(sums, finite, strict=True) if not fine]
        return bad[-1].removesuffix(".change") if bad else ""

    def codes(self) -> Codes:
        """What the plan would have now, on the host."""
        weights = {
            name: PackedWeight(self.known.weights[name].packed, layer.scales().cpu(), layer.packed.grid)
            for name, layer in self.layers.items()
        }
        fitted = {name: value for name, value in self.free.items() if not name.endswith(".change")}
        others = {name: value.detach().to("cpu", copy=True) for name, value in fitted.items()}
        return replace(self.known, weights=weights, parameters={**self.known.parameters, **others})

    def inputs(self, text: Judged) -> _Inputs:
        """What the blocks are called with; what else they get, such as a mask, is the same for all windows."""
        found = capture(self.model, self.family, text.tokens, device=self.head.device)
        return _Inputs(torch.cat(found.hidden), found.kwargs, text.answers)

    @torch.no_grad()
    def mean_kl(self, text: _Inputs) -> float:
        """Over all windows, one after the other."""
        windows = torch.arange(len(text.hidden)).split(1)
        return float(torch.stack([self.kl(text, window) for window in windows]).mean())

    def kl(self, text: _Inputs, windows: torch.Tensor) -> torch.Tensor:
        """Mean KL per token of some windows (their numbers), a scalar."""
        hidden = text.hidden[windows.to(text.hidden.device)]
        for index, block in enumerate(blocks(self.model, self.family)):
            hidden = self._saving(self._call, block, f"{self.family.blocks}.{index}.", hidden, text.kwargs)
        norm = self.model.get_submodule(self.family.final_norm)
        final = self._call(norm, f"{self.family.final_norm}.", hidden, {}).flatten(0, 1)
        projected, negentropy = (
            values[windows.to(values.device)].flatten(0, 1).to(final.device)
            for values in (text.answers.projected, text.answers.negentropy)
        )
        size = CHUNK_TOKENS.get(final.device.type, CHUNK_TOKENS_ELSEWHERE)
        parts = zip(projected.split(size), negentropy.split(size), final.split(size), strict=True)
        return torch.stack([self._saving(self._sum, *part) for part in parts]).sum() / len(final)

    def _call(self, module: nn.Module, prefix: str, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """A part of the model, with what is free in the model's own dtype."""
        own = {
            name.removeprefix(prefix): value if name.endswith(".change") else value.to(self.head.dtype)
            for name, value in self.free.items()
            if name.startswith(prefix)
        }
        output = functional_call(module, own, (hidden,), dict(kwargs))
        return output[0] if isinstance(output, tuple) else output

    def _sum(self, projected: torch.Tensor, negentropy: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
        one = torch.zeros(1, dtype=torch.long, device=final.device)
        return Reference(projected[None], negentropy[None]).kl(self.head, final, one).sum()

    def _saving(self, function: Any, *arguments: Any) -> torch.Tensor:
        """Its result; what its gradient needs is computed once more, not kept."""
        if not torch.is_grad_enabled():
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False)  # pyright: ignore[reportReturnType]
