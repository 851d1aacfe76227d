"""The coordinates that a checkpoint's weights are in: what was folded into them, found by comparing parameters.

A checkpoint may be a transformed model: channel scales moved between norms, v, up and the layers that read them
(SmoothQuant, AWQ), heads turned between v and o, the residual stream rotated (QuaRot, SpinQuant). Then a layer's codes
belong to another input than the unquantised layer's, and their outputs cannot be compared. Here the unquantised block
is brought into the checkpoint's coordinates: the same function, with the checkpoint's norms, and weights that the codes
are a rounding of. After that everything is measured as if the transforms had been folded here.

- The stream: the orthogonal Q nearest to E' = E Q, from both embeddings (Schönemann 1966, Psychometrika 31).
- Norms: the ratio of the scales goes into the readers.
- v and o, up and down: the T with the least squared error of Ŵ = T W. Of "none", "a scale per channel" and, between v
  and o, "a matrix per head" the first is taken that leaves at most twice the error of the best.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.families import Family
from halfbyte.models.folding import fold_scales_
from halfbyte.models.modules import linear
from halfbyte.transforms.rotation import rotate_block_, transform_heads_

SAME = 1e-3  # squared error of an embedding over its power: what rounding to fp16 or bf16 leaves is far less
TURNED = 1e-2  # the same for a rotated one
CODES = 0.25  # the same for int4 codes: plain rounding leaves 0.01 to 0.02, GPTQ 0.02 to 0.07, another model about 2
PULL = 1e-7  # of matrices to the identity, as a share of a head's power
ROWS_PER_CHANNEL = 4  # of the embedding, to find a rotation


def stream_rotation(
    own: torch.Tensor, other: torch.Tensor, device: torch.device, *, where: object
) -> torch.Tensor | None:
    """Q with ``other ≈ own Q``, fp32 ``[hidden, hidden]`` on ``device``, or None where it is the identity.

    Args:
        own, other: embeddings ``[vocab, hidden]`` of the model and of the checkpoint; some rows are compared.

    Raises:
        HalfbyteError: the second is neither the first nor a rotation of it.
    """
    stride = max(1, len(own) // (ROWS_PER_CHANNEL * own.shape[1]))
    a, b = (rows[::stride].to(device).float() for rows in (own, other))
    power = float(a.square().sum())
    if float((b - a).square().sum()) <= SAME * power:
        return None
    left, _, right = torch.linalg.svd(a.T @ b)
    turn = left @ right
    error = float((b - a @ turn).square().sum())
    if not error <= TURNED * power:
        raise HalfbyteError(
            "the checkpoint is of another model",
            where=where,
            expected="the embedding of --model_id, or a rotation of it",
            got=f"a difference of {error / max(power, 1e-30):.2g} of its power",
            fix="name the model that the checkpoint was made from with --model_id",
        )
    return turn


def adopt_frame_(
    block: nn.Module,
    family: Family,
    weights: Mapping[str, torch.Tensor],
    norms: Mapping[str, torch.Tensor],
    turn: torch.Tensor | None,
    head_dim: int,
) -> None:
    """Bring an unquantised block into the coordinates of a checkpoint, in place; its function stays.

    Args:
        weights: linear in the block -> what the checkpoint's codes decode to, fp32 ``[out, in]``.
        norms: norm in the block -> the checkpoint's scales ``[features]``.
        turn: see :func:`stream_rotation`.
    """
    if turn is not None:
        rotate_block_(block, family, lambda rows: rows @ turn)
    for norm, readers in family.norm_readers:
        own = block.get_submodule(norm).weight
        assert isinstance(own, torch.Tensor)
        other = norms[norm].to(own)
        alive = (own != 0) & (other != 0)
        scales = torch.where(alive, own / torch.where(alive, other, 1), 1)
        if not torch.equal(scales, torch.ones_like(scales)):
            fold_scales_(block, family, readers, scales, head_dim=head_dim)
    heads = _heads(block, family, weights, head_dim)
    if heads is not None:
        transform_heads_(block, family, heads, torch.linalg.inv(heads), head_dim)
    scales = _scales(linear(block, family.up).weight, weights[family.up])
    if scales is not None:
        fold_scales_(block, family, (family.down,), 1 / scales, head_dim=head_dim)


def check_frame(weight: torch.Tensor, codes: torch.Tensor, *, where: object) -> None:
    """Refuse codes that are not a rounding of an unquantised weight in the same coordinates.

    Args:
        weight, codes: fp32 ``[out, in]``, codes as they decode.

    Raises:
        HalfbyteError: saying how far away they are.
    """
    power, error = float(weight.square().sum()), float((codes - weight).square().sum())
    if not error <= CODES * power:
        raise HalfbyteError(
            "the checkpoint's weights are not the model's, up to channel scales and rotations",
            where=where,
            expected=f"a difference of at most {CODES:g} of their power",
            got=f"{error / max(power, 1e-30):.2g}",
            fix="name the model that the checkpoint was made from with --model_id",
        )


def _scales(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """t with ``other ≈ diag(t) own`` ``[out]``, or None where ones do as well."""
    scales = _row_scales(own, other)
    best = (other - scales[:, None] * own).square().sum()
    return None if bool((other - own).square().sum() <= 2 * best) else scales


def _heads(block: nn.Module, family: Family, weights: Mapping[str, torch.Tensor], head_dim: int) -> torch.Tensor | None:
    """T with Ŵv ≈ T Wv and Ŵo ≈ Wo T⁻¹ per head, ``[heads, head_dim, head_dim]``; None where the identity does as well.

    A whole matrix is the least-squares solution of Ŵv = T Wv and Ŵo T = Wo, a Sylvester equation D T + T A = C with
    symmetric D and A (Bartels and Stewart 1972, Comm. ACM 15); a model's head may be as wide as v's input.
    """
    a, b = (_value_rows(rows, head_dim) for rows in (linear(block, family.value).weight, weights[family.value]))
    outs = (linear(block, family.attention_out).weight, weights[family.attention_out])
    c, d = (_out_columns(columns, len(a), head_dim) for columns in outs)
    weigh_v, weigh_o = (1 / side.square().sum((1, 2), keepdim=True).clamp_min(1e-20) for side in (a, c))
    eye = torch.eye(head_dim).to(a)
    left, right = weigh_o * d @ d.mT + PULL * eye, weigh_v * a @ a.mT + PULL * eye  # to 1 where heads are dead
    system = weigh_v * b @ a.mT + weigh_o * d @ c.mT + 2 * PULL * eye
    (low, u), (high, v) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    whole = u @ ((u.mT @ system @ v) / (low[:, :, None] + high[:, None, :])) @ v.mT
    scales = _row_scales(a.flatten(0, 1), b.flatten(0, 1)).view(-1, head_dim)
    candidates = (eye.expand_as(whole), torch.diag_embed(scales), whole)

    def error(matrix: torch.Tensor) -> float:
        value, out = b - matrix @ a, d - torch.linalg.inv(matrix).mT @ c
        return float((weigh_v * value.square()).sum() + (weigh_o * out.square()).sum())

    errors = [error(matrix) for matrix in candidates]
    chosen = next(index for index, found in enumerate(errors) if found <= 2 * min(errors))
    return None if chosen == 0 else candidates[chosen]


def _value_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """v by head: ``[out, in]`` -> ``[heads, head_dim, in]``."""
    return weight.view(-1, head_dim, weight.shape[1])


def _out_columns(weight: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """o by the value head that its columns read: ``[out, in]`` -> ``[heads, head_dim, query heads of it * out]``."""
    return weight.view(len(weight), heads, -1, head_dim).permute(1, 3, 2, 0).flatten(2)


def _row_scales(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """t with the least ``|other − diag(t) own|²`` ``[out]``; 1 for rows that are dead on either side."""
    scales = (own * other).sum(1) / own.square().sum(1).clamp_min(1e-30)
    return torch.where(scales == 0, torch.ones_like(scales), scales)
