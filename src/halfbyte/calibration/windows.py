"""Cut token sequences into windows. Imports no torch, so that small workers can use it."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.core.errors import HalfbyteError


def cut(
    token_ids: Sequence[int], length: int, count: int, *, spread: bool = False, where: str = "text"
) -> list[list[int]]:
    """At most ``count`` windows of ``length`` tokens.

    Args:
        spread: take windows evenly over the whole text, instead of the first ones in a row (as llama.cpp does).
        where: what to name in an error.

    Raises:
        HalfbyteError: the text is shorter than one window.
    """
    whole = len(token_ids) // length
    if whole < 1:
        raise HalfbyteError(
            f"{where}: text is shorter than one window, expected {length} tokens, got {len(token_ids)}",
            fix="use a longer text or a smaller --ctx",
        )
    count = min(count, whole)
    starts = [(index * whole // count if spread else index) * length for index in range(count)]
    return [list(token_ids[start : start + length]) for start in starts]


def scored(token_ids: Sequence[int], ctx: int, chunks: int, *, bos: int | None, where: str) -> list[list[int]]:
    """The first ``chunks`` windows of ``ctx`` tokens, for evaluation, as llama.cpp's perplexity tool cuts them.

    If ``bos`` is given, it is put in front of the text, and then replaces the first token of each window.

    Raises:
        HalfbyteError: the text is shorter than one window, or ``ctx`` too small to score anything.
    """
    if ctx < 4:
        raise HalfbyteError(f"--ctx: context is too short, expected at least 4, got {ctx}")
    if chunks < 1:
        raise HalfbyteError(f"--chunks: must be positive, got {chunks}")
    if bos is None:
        return cut(token_ids, ctx, chunks, where=where)
    return [[bos, *window[1:]] for window in cut([bos, *token_ids], ctx, chunks, where=where)]


def first_scored(ctx: int) -> int:
    """Position of the first prediction that is scored in a window of ``ctx`` tokens; the last is ``ctx - 2``."""
    return ctx // 2


def scored_tokens(ctx: int) -> int:
    """How many predictions are scored in a window of ``ctx`` tokens."""
    return ctx - first_scored(ctx) - 1
