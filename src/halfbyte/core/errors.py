"""The one error that users see: what is wrong, where, what was expected, what to do."""

from __future__ import annotations


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an exception's message that says something, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:limit]


class HalfbyteError(Exception):
    """A problem the user can act on. The command line prints it as one line and exits with code 2.

    Args:
        text: ``where: what is wrong, expected X, got Y``; line ends and runs of spaces become one space.
        fix: what to do about it, as an imperative clause or a command.
    """

    def __init__(self, text: str, *, fix: str | None = None) -> None:
        self.text, self.fix = " ".join(text.split()), fix
        super().__init__(" ".join(f"{text}; {fix}".split()) if fix else self.text)
