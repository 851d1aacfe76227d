"""Text that the model writes itself, for when no other is at hand."""

from __future__ import annotations

from typing import Any

import torch


def write_with(model: torch.nn.Module, tokenizer: Any, *, seed: int, samples: int = 24, length: int = 384) -> str:
    """Text that the model writes itself, sampled at temperature 1 from one random first token per sample.

    Cf. LLM-QAT (Liu et al. 2023, arXiv:2305.17888), which generates its training data so.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(tokenizer), (samples, 1), generator=generator)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = model.generate(  # pyright: ignore[reportCallIssue]
            first.to(device),
            attention_mask=torch.ones_like(first).to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=length,
            min_new_tokens=length,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    return "\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True))
