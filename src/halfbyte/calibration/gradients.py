"""Mean squared gradient of the language-model loss at the output of every linear layer (empirical Fisher, diagonal)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from halfbyte.models.layers import Layer


def output_gradient_power(
    model: nn.Module, layers: Sequence[Layer], tokens: torch.Tensor
) -> Iterator[dict[str, float]]:
    """After each window of ``tokens`` ``[windows, length]``, yield layer name -> mean squared gradient so far.

    The loss is the mean next-token cross-entropy of the window, scaled by its length: the gradient of one token's loss.
    Only activations carry gradients; no parameter does.
    """
    sums = dict.fromkeys((layer.name for layer in layers), 0.0)
    handles = []
    for layer in layers:

        def hook(_: nn.Module, __: tuple, output: torch.Tensor, name: str = layer.name) -> None:
            def see(gradient: torch.Tensor) -> None:
                sums[name] += float(gradient.float().square().mean())

            output.register_hook(see)

        handles.append(model.get_submodule(layer.name).register_forward_hook(hook))
    device = next(model.parameters()).device
    embed = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    try:
        for done, window in enumerate(tokens, start=1):
            ids = window.unsqueeze(0).to(device)
            embedded = embed(ids).detach().requires_grad_(True)
            with torch.enable_grad():
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
                nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()
            yield {name: total / done for name, total in sums.items()}
    finally:
        for handle in handles:
            handle.remove()
