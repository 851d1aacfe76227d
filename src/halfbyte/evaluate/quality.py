"""Perplexity, KL divergence and top-1 agreement, by the method of llama.cpp's perplexity tool.

The text is tokenised whole and cut into windows of ``ctx`` tokens in a row; where the vocabulary asks for it, the first
token of each window is replaced by BOS. Of each window the predictions from position ``ctx / 2`` on are scored, so
``ctx / 2 - 1`` tokens per window (llama.cpp, tools/perplexity/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from halfbyte.calibration.text import SOURCES, first_scored, load_text, scored_of_each
from halfbyte.core.errors import HalfbyteError, reading
from halfbyte.core.files import check_space, write_error
from halfbyte.core.progress import report
from halfbyte.models.loading import SourceModel

LogitsOf = Callable[[Sequence[int]], torch.Tensor]
"""Tokens of one window -> logits ``[ctx / 2 - 1, vocab]`` that predict the tokens from ``ctx / 2 + 1`` on."""


def targets_of(window: Sequence[int]) -> torch.Tensor:
    """The tokens that are scored in one window, int64 ``[ctx / 2 - 1]``."""
    return torch.tensor(window[first_scored(len(window)) + 1 :], dtype=torch.int64)


def model_logits(model: torch.nn.Module) -> LogitsOf:
    """Logits of a transformers model (original or simulation)."""
    device = next(model.parameters()).device

    def logits(window: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([list(window)], device=device)
        with torch.no_grad():
            answer = model(input_ids=ids, use_cache=False, logits_to_keep=len(window) - first_scored(len(window)))
        return answer.logits[0, :-1].float()

    return logits


class LogitsFile:
    """Logits of all windows in a temporary file, so that two models need not be in memory together."""

    def __init__(self, path: Path, vocab: int, tokens_per_window: int) -> None:
        self.path, self.vocab, self.tokens_per_window = path, vocab, tokens_per_window

    def write(self, windows_of_tokens: Sequence[Sequence[int]], logits_of: LogitsOf, stage: str) -> None:
        """Compute and keep the logits of every window.

        Raises:
            HalfbyteError: the disk is full.
        """
        check_space(self.path, 4 * len(windows_of_tokens) * self.tokens_per_window * self.vocab)
        try:
            with open(self.path, "wb") as handle:
                for done, window in enumerate(windows_of_tokens, start=1):
                    handle.write(logits_of(window).float().cpu().numpy().tobytes())
                    report(stage, done, len(windows_of_tokens), f"window {done}")
        except OSError as error:
            raise write_error(error, self.path) from error

    def __iter__(self) -> Iterator[torch.Tensor]:
        count = self.tokens_per_window * self.vocab
        with open(self.path, "rb") as handle:
            while raw := handle.read(4 * count):
                values = np.frombuffer(raw, dtype=np.float32).reshape(self.tokens_per_window, self.vocab)
                yield torch.from_numpy(values.copy())


def measure(
    token_windows: Sequence[Sequence[int]],
    logits: Iterator[torch.Tensor],
    reference: Iterator[torch.Tensor] | None = None,
    texts: Sequence[str] | None = None,
) -> Quality:
    """Score logits ``[ctx / 2 - 1, vocab]`` of each window against the text and, if given, a reference's logits.

    Args:
        texts: name of the text that each window is from.

    Raises:
        HalfbyteError: the vocabularies differ.
    """
    meter = QualityMeter()
    for window, text in zip(token_windows, texts or [""] * len(token_windows), strict=True):
        ours = next(logits)
        theirs = next(reference) if reference is not None else None
        if theirs is not None and theirs.shape[-1] != ours.shape[-1]:
            raise HalfbyteError(
                f"evaluation: vocabularies differ, expected {theirs.shape[-1]}, got {ours.shape[-1]}",
                fix="compare files of the same model",
            )
        targets = targets_of(window).to(ours.device)
        meter.add(ours, targets, theirs.to(ours.device) if theirs is not None else None, text)
    return meter.result()


def live(token_windows: Sequence[Sequence[int]], logits_of: LogitsOf, stage: str = "") -> Iterator[torch.Tensor]:
    """Logits of each window, computed when asked for."""
    for done, window in enumerate(token_windows, start=1):
        logits = logits_of(window)
        report(stage, done, len(token_windows), f"window {done}")
        yield logits


def kl_per_token(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ model) in nats for each row of ``[tokens, vocab]``, fp32 ``[tokens]``."""
    reference = torch.log_softmax(reference_logits.float(), dim=-1)
    return (reference.exp() * (reference - torch.log_softmax(logits.float(), dim=-1))).sum(dim=-1)


def same_top(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether both rows of ``[tokens, vocab]`` have the same most likely token, bool ``[tokens]``."""
    return reference_logits.argmax(dim=-1) == logits.argmax(dim=-1)


def nll_per_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of ``targets`` ``[tokens]`` under ``[tokens, vocab]``, fp32 ``[tokens]``."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@dataclass(frozen=True)
class Quality:
    """Summary over all scored tokens.

    Attributes:
        ppl: perplexity of the model; ppl_reference: of the reference (None without one).
        kld_mean, kld_p99: KL divergence to the reference, nats per token (None without one).
        top1_agreement: share of tokens with the same most likely token (None without one).
        tokens: tokens scored.
        kld_error: standard error of kld_mean.
        kld_of_texts: kld_mean of each kind of text, where there are several.
    """

    ppl: float
    tokens: int
    ppl_reference: float | None = None
    kld_mean: float | None = None
    kld_p99: float | None = None
    top1_agreement: float | None = None
    kld_error: float | None = None
    kld_of_texts: dict[str, float] = field(default_factory=dict)


class QualityMeter:
    """Collects per-token values chunk by chunk, and sums them up."""

    def __init__(self) -> None:
        self._nll: list[torch.Tensor] = []
        self._reference_nll: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._same: list[torch.Tensor] = []
        self._texts: list[str] = []

    def add(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        reference_logits: torch.Tensor | None = None,
        text: str = "",
    ) -> None:
        """Score one chunk: ``logits`` ``[tokens, vocab]``, ``targets`` ``[tokens]``, reference like ``logits``.

        Args:
            text: the name of the text that it is from.
        """
        self._nll.append(nll_per_token(logits, targets).cpu())
        if reference_logits is not None:
            self._reference_nll.append(nll_per_token(reference_logits, targets).cpu())
            self._kl.append(kl_per_token(reference_logits, logits).cpu())
            self._same.append(same_top(reference_logits, logits).cpu())
            self._texts.append(text)

    def result(self) -> Quality:
        """The summary of everything added so far."""
        nll = torch.cat(self._nll)
        ppl = float(nll.mean().exp())
        if not self._kl:
            return Quality(ppl=ppl, tokens=nll.numel())
        kl = torch.cat(self._kl)
        return Quality(
            ppl=ppl,
            tokens=nll.numel(),
            ppl_reference=float(torch.cat(self._reference_nll).mean().exp()),
            kld_mean=float(kl.mean()),
            kld_p99=float(torch.quantile(kl, 0.99)),
            top1_agreement=float(torch.cat(self._same).float().mean()),
            kld_error=float(kl.std() / kl.numel() ** 0.5),
            kld_of_texts=self._of_texts(),
        )

    def _of_texts(self) -> dict[str, float]:
        """KL of each text, if there are several."""
        names = dict.fromkeys(self._texts)
        chunks = list(zip(self._texts, self._kl, strict=True))
        own = {name: torch.cat([kl for text, kl in chunks if text == name]) for name in names}
        return {name: float(kl.mean()) for name, kl in own.items()} if len(own) > 1 else {}


def evaluation_text(name: str, searched: str | None) -> tuple[str, dict[str, str]]:
    """What to evaluate on, not what a plan's search has seen: its name, and name -> text of what it consists of.

    A named source and a mixture give ``eval`` parts. A file is used whole, or, if the plan was searched on it, its
    ``eval`` part.

    Args:
        name: as for :func:`halfbyte.calibration.text.load_text`.
        searched: digest of the plan's search text (``plan.text["search"]``), or None.
    """
    text = load_text(name)
    file = Path(text.name)
    own = text.record()["search"].partition(",")[0]
    if text.name in SOURCES or not file.exists() or own in (searched or "").split(","):
        return f"{text.name} (eval part)", {one.name: one.parts["eval"] for one in text.mixed or (text,)}
    return text.name, {text.name: file.read_text(encoding="utf-8")}


def windows_for(source: SourceModel, text: str, ctx: int, chunks: int, *, where: str) -> list[list[int]]:
    """Scored windows of one text with the model's own tokenizer; BOS in front if the tokenizer adds one."""
    return windows_of(source.tokenizer, {where: text}, ctx, chunks, where=where)[0]


def windows_of(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], ctx: int, chunks: int, *, where: str
) -> tuple[list[list[int]], list[str]]:
    """The same of several texts for a tokenizer alone, and the name of the text of each window."""
    with_special = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int) or with_special[:1] != [bos]:
        bos = None

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    return scored_of_each(tokenize, texts, ctx, chunks, bos=bos, where=where)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt, in the model's chat format where it has one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    messages = [{"role": "user", "content": prompt}]
    with reading(tokenizer.name_or_path, "chat template"):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def sample_text(source: SourceModel, prompt: str, max_tokens: int) -> str:
    """A greedy answer to ``prompt``, in the model's chat format where it has one."""
    tokenizer: Any = source.tokenizer
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=source.device)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad():
        answer = source.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=padding,
        )
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()
