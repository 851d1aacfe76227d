"""Perplexity, KL divergence and top-1 agreement, by the method of llama.cpp's perplexity tool.

The text is tokenised whole and cut into windows of ``ctx`` tokens in a row; where the vocabulary asks for it, the first
token of each window is replaced by BOS. Of each window the predictions from position ``ctx / 2`` on are scored, so
``ctx / 2 - 1`` tokens per window (llama.cpp, tools/perplexity/README.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from halfbyte.calibration.windows import first_scored
from halfbyte.errors import HalfbyteError
from halfbyte.files import check_space, write_error
from halfbyte.numerics.metrics import Quality, QualityMeter
from halfbyte.progress import Progress, Reporter, silent

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

    def write(
        self, windows_of_tokens: Sequence[Sequence[int]], logits_of: LogitsOf, report: Reporter, stage: str
    ) -> None:
        """Compute and keep the logits of every window.

        Raises:
            HalfbyteError: the disk is full.
        """
        check_space(self.path, 4 * len(windows_of_tokens) * self.tokens_per_window * self.vocab)
        try:
            with open(self.path, "wb") as handle:
                for done, window in enumerate(windows_of_tokens, start=1):
                    handle.write(logits_of(window).float().cpu().numpy().tobytes())
                    report(Progress(stage, done, len(windows_of_tokens), f"window {done}"))
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
) -> Quality:
    """Score logits ``[ctx / 2 - 1, vocab]`` of each window against the text and, if given, a reference's logits.

    Raises:
        HalfbyteError: the vocabularies differ.
    """
    meter = QualityMeter()
    for window in token_windows:
        ours = next(logits)
        theirs = next(reference) if reference is not None else None
        if theirs is not None and theirs.shape[-1] != ours.shape[-1]:
            raise HalfbyteError(
                "vocabularies differ", where="evaluation", expected=theirs.shape[-1], got=ours.shape[-1],
                fix="compare files of the same model",
            )  # fmt: skip
        targets = targets_of(window).to(ours.device)
        meter.add(ours, targets, theirs.to(ours.device) if theirs is not None else None)
    return meter.result()


def live(
    token_windows: Sequence[Sequence[int]], logits_of: LogitsOf, report: Reporter = silent, stage: str = ""
) -> Iterator[torch.Tensor]:
    """Logits of each window, computed when asked for."""
    for done, window in enumerate(token_windows, start=1):
        logits = logits_of(window)
        report(Progress(stage, done, len(token_windows), f"window {done}"))
        yield logits


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for logits files, removed when it is closed."""
    return tempfile.TemporaryDirectory(prefix="halfbyte-")
