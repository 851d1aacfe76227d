"""Weights in groups along the input: W4 symmetric, one fp16 scale per group; codes are integers of a grid.

The scale is rounded to fp16 when it is chosen, so that every export carries the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.quant.affine import divided
from halfbyte.quant.grids import INT4, Grid
from halfbyte.quant.kernels import use_triton

CHUNK_ELEMENTS = 2**20  # of decoded weights; each takes about 10 bytes of temporaries


@dataclass(frozen=True)
class ScaleRule:
    """What a group's scale may be, apart from an fp16 number, and on which grid its codes are.

    Attributes:
        bf16: exactly representable in bf16 too, for engines that keep scales in the model's dtype.
        signed: it may be negative, which turns the grid around.
        grid: what 4-bit codes may be.
        by_row: what the scales of a row may be depends on that row alone.
    """

    bf16: bool = False
    signed: bool = True
    grid: Grid = INT4
    by_row: bool = True

    def rounded(self, scales: torch.Tensor) -> torch.Tensor:
        """The nearest such fp16 numbers. What fp16 makes of a bf16 number is one: it has 11 bits, and 8 are used; below
        2⁻¹⁷ it is a multiple of 2⁻²⁴ of at most 7 bits."""
        return (scales.to(torch.bfloat16) if self.bf16 else scales).to(torch.float16)

    def fitted(self, scales: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """Scales ``[out, groups]`` of one module that an engine takes over as they are; here those of :meth:`rounded`.

        Scales that are fitted come back unchanged.

        Args:
            known: fitted scales whose codes are kept: then the largest of them stay what they are.
        """
        return scales


ANY_FP16 = ScaleRule()


@dataclass(frozen=True)
class GroupedWeight:
    """Encoded weights of one linear layer, while they are chosen.

    Attributes:
        codes: int8 ``[out, in]``, values in [-2^(bits-1), 2^(bits-1) - 1], or those of the grid.
        scales: fp16 ``[out, in / group_size]``.
        bits: code width.
        grid: what 4-bit codes may be.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int = 4
    grid: Grid = INT4

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Elements along the input that share one scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Code bits plus the share of the scale."""
        return self.bits + 16 / self.group_size

    def decode(self) -> torch.Tensor:
        """The weights that the codes stand for, fp32 ``[out, in]``."""
        out_features, in_features = self.codes.shape
        grouped = self.codes.view(out_features, -1, self.group_size).float()  # [out, groups, group]
        return (grouped * self.scales.float().unsqueeze(-1)).view(out_features, in_features)

    def pack(self) -> PackedWeight:
        """The same, two codes to a byte.

        Raises:
            HalfbyteError: codes of another width than 4 bits, or an odd number of inputs.
        """
        if self.bits != 4:
            raise HalfbyteError(f"pack: only 4-bit codes are packed, expected 4, got {self.bits}")
        packed = pack_int4(self.grid.to_nibbles(self.codes))
        return PackedWeight(packed.contiguous(), self.scales.contiguous(), self.grid)

    def to(self, device: torch.device | str) -> GroupedWeight:
        """The same on ``device``."""
        return GroupedWeight(self.codes.to(device), self.scales.to(device), self.bits, self.grid)


@dataclass(frozen=True)
class PackedWeight:
    """Encoded 4-bit weights of one linear layer as they are kept, in memory and in files.

    Attributes:
        packed: two codes to a byte (:func:`halfbyte.quant.int4.pack_int4`), uint8 ``[out, in / 2]``.
        scales: fp16 ``[out, in / group_size]``.
        grid: what a code stands for.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    grid: Grid = INT4

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def group_size(self) -> int:
        """Elements along the input that share one scale."""
        return self.shape[1] // self.scales.shape[1]

    def unpack(self) -> GroupedWeight:
        """One byte per code."""
        return GroupedWeight(self.grid.from_nibbles(unpack_int4(self.packed)), self.scales, grid=self.grid)

    def decode(self) -> torch.Tensor:
        """The weights that the codes stand for, fp32 ``[out, in]``."""
        return self.unpack().decode()

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on ``device``; the same tensors if they are there."""
        return PackedWeight(self.packed.to(device), self.scales.to(device), self.grid)


def check_packable(in_features: int, *, where: object) -> None:
    """Refuse, before codes are chosen, a layer whose codes could not be packed.

    Raises:
        HalfbyteError: an odd number of inputs.
    """
    if in_features % 2:
        raise HalfbyteError(
            f"{where}: an odd number of inputs cannot be packed two to a byte, expected an even number, "
            f"got {in_features}",
            fix="this model's weights cannot be kept in 4 bits",
        )


def fitting_group_size(in_features: int, asked: int) -> int:
    """``asked`` if it divides the row, else the largest power of two that does and is not larger."""
    if in_features % asked == 0:
        return asked
    size = 1
    while size * 2 <= asked and in_features % (size * 2) == 0:
        size *= 2
    return size


def check_finite(tensor: torch.Tensor, where: object, what: str = "weights are") -> None:
    """Refuse NaN and Inf.

    Raises:
        HalfbyteError: naming ``where`` and how many values are not finite.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise HalfbyteError(
            f"{where}: {what} not finite, expected no NaN or Inf, got {bad} of {tensor.numel()} values",
            fix="check the checkpoint; compute in bf16 or fp32, never fp16",
        )


def encode_with_scales(weight: torch.Tensor, scales: torch.Tensor, bits: int = 4, grid: Grid = INT4) -> GroupedWeight:
    """Round ``weight`` ``[out, in]`` to the grid of given fp16 ``scales`` ``[out, groups]``; scale 0 codes 0.

    A scale may be negative: it turns the grid around, so that the one code more is on the other side.
    """
    out_features, in_features = weight.shape
    top = 2 ** (bits - 1) - 1
    step = scales.float().unsqueeze(-1)  # [out, groups, 1]
    grouped = weight.float().reshape(out_features, scales.shape[1], -1)
    codes = grouped / torch.where(step == 0, torch.full_like(step, torch.inf), step)
    codes = codes.round().clamp(-top - 1, top) if grid.even else grid.nearest_(codes)
    return GroupedWeight(codes.to(torch.int8).view(out_features, in_features), scales, bits, grid)


def absmax_scales(
    weight: torch.Tensor, group_size: int, bits: int = 4, *, rule: ScaleRule = ANY_FP16, where: object = "weight"
) -> torch.Tensor:
    """Scales ``max|group| / (2^(bits-1) - 1)``, or over the grid's largest code, ``[out, in / group_size]``.

    Raises:
        HalfbyteError: NaN or Inf in ``weight``, or a group too large for an fp16 scale.
    """
    check_finite(weight, where)
    out_features = weight.shape[0]
    largest = weight.float().reshape(out_features, -1, group_size).abs().amax(dim=-1)
    top = 2 ** (bits - 1) - 1 if rule.grid.even else rule.grid.top
    scales = rule.fitted(rule.rounded(divided(largest, top)))
    if bool(torch.isinf(scales).any()):
        raise HalfbyteError(f"{where}: weights too large for fp16 scales, got max |w| = {float(largest.max()):.4g}")
    return scales


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack int8 codes ``[..., n]`` in [-8, 7] into uint8 ``[..., n / 2]``; the even element is the low nibble.

    Raises:
        HalfbyteError: ``n`` is odd or a code does not fit.
    """
    if codes.shape[-1] % 2:
        raise HalfbyteError(f"pack_int4: cannot pack an odd number of codes, got {codes.shape[-1]}")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise HalfbyteError("pack_int4: code does not fit four bits, expected -8 to 7")
    nibbles = (codes & 0xF).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_int4`: int8 codes ``[..., 2 * n]`` from uint8 ``[..., n]``."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).to(torch.int8)  # [..., n, 2]
    return torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(-2)


def decode_packed(
    packed: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
    grid: Grid = INT4,
) -> torch.Tensor:
    """The weights ``[out, in]`` that packed codes stand for, in ``dtype``; the Triton twin gives the same bits.

    Args:
        packed: uint8 ``[out, in / 2]`` of :func:`pack_int4`.
        scales: fp16 ``[out, groups]``.
        out: where to write, ``[out, in]`` of ``dtype``, contiguous; otherwise a new tensor.
    """
    shape = (packed.shape[0], 2 * packed.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    assert (out.shape, out.dtype, out.is_contiguous()) == (shape, dtype, True), "a buffer of another kind"
    if use_triton(packed):
        from halfbyte.quant.kernels.triton_kernels import decode_packed as fast

        return fast(packed, scales, out, grid)
    rows = max(1, CHUNK_ELEMENTS // max(1, shape[1]))
    for part in (slice(start, start + rows) for start in range(0, shape[0], rows)):
        out[part] = PackedWeight(packed[part], scales[part], grid).decode()
    return out


def searched_scales(
    weight: torch.Tensor,
    group_size: int,
    importance: torch.Tensor,
    *,
    rule: ScaleRule = ANY_FP16,
    where: object = "weight",
) -> torch.Tensor:
    """fp16 scales of 4-bit codes ``[out, in / group_size]`` with the least ``Σ importance_j (w_j − ŵ_j)²`` per group.

    Tried are the grid's ratios of the absmax scale. With integers also those of absmax / 8 with the sign that puts the
    largest weight on the lowest code: the symmetric grid has one more code on that side, and a negative scale turns it
    around (as ggml's Q4_0 does). Where ``rule`` forbids negative scales, its size is tried.

    Args:
        weight: ``[out, in]``.
        importance: what an error in each input channel costs, ``[in]``: the diagonal of the Hessian.
    """
    full = absmax_scales(weight, group_size, rule=rule, where=where)
    grouped = weight.float().reshape(weight.shape[0], -1, group_size)  # [out, groups, group]
    cost = importance.float().view(-1, group_size)
    largest = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    lowest = rule.rounded((-largest if rule.signed else largest.abs()) / 8)
    best = full.clone()
    least = torch.full(full.shape, float("inf"), device=weight.device)
    for start in (full, lowest) if rule.grid.even else (divided(largest.abs(), rule.grid.top),):
        for ratio in rule.grid.ratios:
            scales = rule.rounded(start.float() * ratio)
            step = scales.float().unsqueeze(-1)
            safe = torch.where(step == 0, torch.ones_like(step), step)
            error = rule.grid.nearest_(grouped / safe).mul_(step).sub_(grouped)
            total = torch.einsum("ogk,gk->og", error.square_(), cost)
            better = total < least
            best, least = torch.where(better, scales, best), torch.where(better, total, least)
    return rule.fitted(best)
