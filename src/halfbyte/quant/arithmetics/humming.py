"""Humming's integer kernels (humming-kernels 0.1.19), which vLLM runs on Nvidia GPUs from Turing to Ada.

Inputs: ``s = absmax / 7`` for A4 and ``absmax / 127`` for A8, per token or per group of channels, rounded half to even,
codes from −8 and −128 on. Weights: with one scale per token the group scales of a module become integers, the largest
of them 1,024 (its ``process_int_weight_scale``); with scales per group they stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from halfbyte.quant.arithmetics import Arithmetic, in_steps
from halfbyte.quant.int4 import ScaleRule

if TYPE_CHECKING:
    from halfbyte.quant.quant_linear import InputScheme

LEAST_SCALE = 1e-30  # of a row of zeros, as there
INTEGERS = 1024  # the largest group scale of a module becomes this integer


class Humming(Arithmetic):
    """See the module; ``scheme.group`` channels share a scale, all of a token's if that is 0."""

    def rounded_to(self, x: torch.Tensor, bits: int, scheme: InputScheme) -> torch.Tensor:
        rows = x.float()
        grouped = rows.unflatten(-1, (-1, scheme.group)) if scheme.group else rows
        top = 2 ** (bits - 1) - 1
        steps, scale = in_steps(grouped, LEAST_SCALE, top)
        return steps.round_().clamp_(-top - 1, top).mul_(scale).view_as(x).to(x.dtype)


ARITHMETIC = Humming()


@dataclass(frozen=True)
class IntegerScales(ScaleRule):
    """Group scales that Humming takes over without loss: integers up to 1,024 times a power of two.

    The kernel divides a module's scales by their largest / 1,024 and rounds. So the largest is made a power of two, and
    all others multiples of its 1,024th part that bf16 holds too.
    """

    bf16: bool = True
    signed: bool = False

    def fitted(self, scales: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """``scales`` of one module on its grid; see :meth:`halfbyte.quant.int4.ScaleRule.fitted`."""
        values = scales.float()
        first = (values if known is None else known.float()).abs()
        top = torch.exp2(torch.log2(first.amax().clamp_min(2.0**-14)).ceil())
        step = top / INTEGERS
        whole = self._in_bf16((values / step).round()).clamp(0, INTEGERS)
        fitted = (whole * step).contiguous()
        at = first.flatten().argmax()  # the module's largest scale is the power of two itself
        fitted.view(-1)[at] = top
        return fitted.to(scales.dtype)

    @staticmethod
    def _in_bf16(whole: torch.Tensor) -> torch.Tensor:
        return whole.to(torch.bfloat16).float()
