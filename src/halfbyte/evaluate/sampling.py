"""What evaluation needs of a transformers model: its windows of text, and a sample answer."""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.calibration.windows import scored
from halfbyte.models.loading import SourceModel


def windows_for(source: SourceModel, text: str, ctx: int, chunks: int, *, where: str) -> list[list[int]]:
    """Scored windows with the model's own tokenizer; BOS in front if the tokenizer adds one."""
    with_special = source.tokenizer("a").input_ids
    bos = source.tokenizer.bos_token_id
    if not isinstance(bos, int) or with_special[:1] != [bos]:
        bos = None
    ids = source.tokenizer(text, add_special_tokens=False).input_ids
    return scored(ids, ctx, chunks, bos=bos, where=where)


def sample_text(source: SourceModel, prompt: str, max_tokens: int) -> str:
    """A greedy answer to ``prompt``, in the model's chat format where it has one."""
    tokenizer: Any = source.tokenizer
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(source.device)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad():
        answer = source.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
            repetition_penalty=1.0, pad_token_id=padding,
        )  # fmt: skip
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()
