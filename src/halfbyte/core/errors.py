"""The one error that users see: what is wrong, where, what was expected, what to do."""

from __future__ import annotations


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an exception's message that says something, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:limit]


class HalfbyteError(Exception):
    """A problem the user can act on. The command line prints it as one line and exits with code 2.

    Args:
        what: what is wrong, as a short clause ("budget is out of range").
        where: the file, flag, layer or tensor it was found in.
        expected: what would have been right.
        got: what was there instead.
        fix: what to do about it, as an imperative clause or a command.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        parts = [f"{where}: {what}" if where is not None else what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        line = ", ".join(parts)
        if fix:
            line += f"; {fix}"
        super().__init__(" ".join(line.split()))
