"""The command line: parse, draw progress, print tables, exit codes.

    halfbyte search | export [gguf] | export vllm | compare | simulate | eval | doctor

Exit codes: 0 done, 2 something the user can put right (one line on standard error, Ctrl-C included).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from halfbyte import __version__
from halfbyte.commands import ALIASES, COMMANDS
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import write_text
from halfbyte.core.progress import listening
from halfbyte.report.terminal import Drawing

Options = TypeVar("Options")


def add_arguments(parser: argparse.ArgumentParser, options: type) -> None:
    """One flag per field of an options dataclass."""
    for item in fields(options):
        about = item.metadata
        text = about["help"] + ("" if item.default in (None, False, True) else f" (default: {item.default})")
        text = text.replace("%", "%%")
        if isinstance(item.default, bool):
            action = argparse.BooleanOptionalAction if item.default else "store_true"
            parser.add_argument(f"--{item.name}", action=action, default=item.default, help=text)
            continue
        kind = type(item.default) if item.default is not None else str
        parser.add_argument(
            f"--{item.name}",
            type=kind,
            default=item.default,
            choices=about["choices"],
            metavar=about["metavar"],
            help=text,
        )


def parse(options: type[Options], arguments: Sequence[str], *, prog: str | None, about: str) -> Options:
    """Parse ``arguments`` into an options dataclass; wrong flags end the program with exit code 2."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    add_arguments(parser, options)
    return options(**vars(parser.parse_args(arguments)))


def run(command: str, arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one command; returns the exit code. This is what the four scripts call."""
    options_type, work = COMMANDS[command]
    options = parse(options_type, sys.argv[1:] if arguments is None else arguments, prog=prog, about=str(work.__doc__))
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):  # a redirected stream on Windows lacks some letters of the tables
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    draw = Drawing()
    started = time.monotonic()
    try:
        with listening(draw.report):
            result = work(options, draw)
        if options.json and not draw.quiet:
            write_text(options.json, json.dumps(result, indent=1, default=str))
            draw.files([Path(options.json)])
    except HalfbyteError as error:
        draw.finish()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        draw.finish()
        again = "; go on with --resume" if command == "search" else ""
        print(
            f"interrupted after {time.monotonic() - started:.0f} s, no partial output is left{again}", file=sys.stderr
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (
            isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate" in str(error)
        ):
            raise
        draw.finish()
        print("error: out of memory; use --dtype bf16, fewer tokens or a smaller model", file=sys.stderr)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``halfbyte COMMAND …``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    lines = "\n".join(f"  {name:<11} {work.__doc__}" for name, (_, work) in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: halfbyte COMMAND [options]\n\n{lines}\n\nhalfbyte COMMAND --help shows a command's options.")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *rest = arguments
    with_kind = " ".join(arguments[:2])  # such as ``export vllm``
    if with_kind in COMMANDS or with_kind in ALIASES:
        command, rest = ALIASES.get(with_kind, with_kind), rest[1:]
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(command, rest, prog=f"halfbyte {command}")


def use_growing_segments() -> None:
    """Let PyTorch leave fewer gaps in GPU memory, which 7B needs on 8 GB; only before it is imported.

    What the user has set stays.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _quiet_libraries() -> None:
    """Libraries report through us; their own progress bars and warnings would break the drawing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    use_growing_segments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
