"""What tokens count where codes are chosen: the gradients are those of the whole model, block by block."""

from __future__ import annotations

import pytest
import torch

from halfbyte.models.loading import find, load
from halfbyte.prepare import token_weights as module
from halfbyte.prepare.token_weights import token_weights
from halfbyte.quant.quantisers import InputMoments

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_they_are_the_gradients_of_the_whole_model(family, tiny_folder, monkeypatch):
    monkeypatch.setattr(module, "POWER", 1.0)
    source = load(find(str(tiny_folder(family))), device=CPU, dtype=torch.float32)
    tokens = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    found = token_weights(source, tokens, device=CPU, seed=1)
    model, seen, chance = source.model, {}, torch.Generator().manual_seed(1)
    group = source.family.groups[0]
    for part in group:
        layer = model.get_submodule(f"{source.family.blocks}.1.{part}")

        def see(_, __, output, part=part):
            output.register_hook(lambda gradient: seen.update({part: gradient}))

        layer.register_forward_hook(see)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    with torch.enable_grad():
        log_p = model(inputs_embeds=embedded).logits.log_softmax(-1)
        below = log_p.detach().exp().cumsum(-1)
        loss = 0.0
        for window in range(len(tokens)):
            draw = torch.rand(tokens.shape[1], 1, generator=chance)
            chosen = torch.searchsorted(below[window], draw).clamp_max(below.shape[-1] - 1)
            loss = loss - log_p[window].gather(-1, chosen).sum()
        loss.backward()
    wanted = sum(seen[part].square().sum(-1) for part in group)
    own = found[f"{source.family.blocks}.1.{group[0]}"]
    assert torch.allclose(own, wanted / wanted.mean(), rtol=1e-3, atol=1e-5)
    assert float(own.mean()) == pytest.approx(1.0)
    assert set(found) == {f"{source.family.blocks}.{at}.{names[0]}" for at in (0, 1) for names in source.family.groups}


def test_a_token_that_counts_twice_is_one_that_was_seen_twice():
    x = torch.randn(6, 8)
    twice, weighted = InputMoments(torch.randn(5, 8)), InputMoments(torch.randn(5, 8))
    twice.add(torch.cat([x, x[:2]]), torch.cat([x, x[:2]]))
    weighted.add(x, x, torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0, 1.0]) * 6 / 8)
    assert torch.allclose(twice.hessian, weighted.hessian, atol=1e-5)
