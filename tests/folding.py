"""What other tools fold into a model before they quantise it, with random numbers."""

from __future__ import annotations

import torch

from halfbyte.models.modules import blocks, fold_scales_, head_dim, linear
from halfbyte.transforms._rotation import rotate_block_, rotate_ends_, transform_heads_

TOKENS = torch.randint(800, (4, 48), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def fold_(model, family, folds):
    """Function-preserving rewrites with random numbers."""
    generator = torch.Generator().manual_seed(1)

    def orthogonal(*shape):
        return torch.linalg.qr(torch.randn(*shape, generator=generator))[0]

    size = head_dim(model.config)
    if "r1" in folds:
        turn = orthogonal(model.config.hidden_size, model.config.hidden_size)
        rotate_ends_(model, family, CPU, lambda rows: rows @ turn)
    for block in blocks(model, family):
        heads = linear(block, family.value).weight.shape[0] // size
        if "r1" in folds:
            rotate_block_(block, family, lambda rows: rows @ turn)
        if "r2" in folds:
            forward = orthogonal(heads, size, size)
            transform_heads_(block, family, forward, forward.mT, size)
        for group in family.groups:
            if "smooth" in folds:
                scales = (0.5 * torch.randn(linear(block, group[0]).in_features, generator=generator)).exp()
                if group == (family.attention_out,):
                    scales = (
                        scales.view(heads, -1, size)[:, :1].expand(heads, len(scales) // heads // size, size).flatten()
                    )
                fold_scales_(block, family, group, scales, head_dim=size)
