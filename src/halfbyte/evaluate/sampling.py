"""What evaluation needs of a transformers model: its windows of text, and a sample answer."""

from __future__ import annotations

import torch

from halfbyte.calibration.windows import scored
from halfbyte.models.loading import SourceModel


def windows_for(source: SourceModel, text: str, ctx: int, chunks: int, *, where: str) -> list[list[int]]:
    """Scored windows with the model's own tokenizer; BOS in front if the tokenizer adds one."""
    with_special = source.tokenizer("a").input_ids
    bos = source.tokenizer.bos_token_id if with_special[:1] == [source.tokenizer.bos_token_id] else None
    ids = source.tokenizer(text, add_special_tokens=False).input_ids
    return scored(ids, ctx, chunks, bos=bos, where=where)


def sample_text(source: SourceModel, prompt: str, max_tokens: int) -> str:
    """A greedy answer to ``prompt``, in the model's chat format where it has one."""
    tokenizer = source.tokenizer
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    ids = {key: value.to(source.device) for key, value in ids.items() if key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        answer = source.model.generate(  # pyright: ignore[reportCallIssue]
            **ids,
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    return tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
