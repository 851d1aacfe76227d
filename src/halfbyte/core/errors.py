"""The one error that users see: what is wrong, where, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def reading(where: object, what: str, *, problem: str = "cannot be read", fix: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises over a file that it was given into one line.

    Args:
        where: the file or folder.
        what: it holds, for the message ("tokenizer").
        problem: what a failure means.

    Raises:
        HalfbyteError: ``where: WHAT PROBLEM``, with the first line of what the library said, or that it is missing.
    """
    try:
        yield
    except (HalfbyteError, MemoryError):
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and str(error.filename) == str(where):
            raise HalfbyteError(f"{where}: {what} is missing", fix=fix) from error
        said = error.strerror or first_line(error)
        raise HalfbyteError(f"{where}: {what} cannot be read, got {said}", fix=fix) from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise HalfbyteError(f"{where}: {what} {problem}, got {first_line(error)}", fix=fix) from error
