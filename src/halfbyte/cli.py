"""The command line: parse, call the library, print what came of it, exit codes.

    halfbyte search | export [gguf] | export vllm | compare | simulate | eval | imatrix | report | doctor

Exit codes: 0 done, 2 something the user can put right (Ctrl-C and SIGTERM included), 1 a bug of ours. For 2 and 1 there
is one line on standard error; that of a bug names a file with the traceback.
"""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import __version__
from halfbyte.arguments import parse
from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.files import cache_folder, write_text
from halfbyte.core.language import say, speaking
from halfbyte.core.progress import listening
from halfbyte.options import (
    CommandOptions,
    CompareOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    ImatrixOptions,
    ReportOptions,
    SearchOptions,
    SimulateOptions,
    VllmExportOptions,
)

if TYPE_CHECKING:
    from halfbyte.report.terminal import Drawing


@dataclass(frozen=True)
class Answer:
    """What a command leaves: text to print, files it wrote, and what ``--json`` keeps."""

    text: str
    record: dict[str, Any]
    files: Sequence[Path] = ()


def search(options: SearchOptions, draw: Drawing) -> Answer:
    """Search a plan and write it."""
    from halfbyte.core.distributed import joined
    from halfbyte.core.environment import peak_process_memory
    from halfbyte.pipeline import search as run
    from halfbyte.report.summary import search_summary

    with joined() as group:
        draw.quiet = not group.first
        result = run(options)
    activations = result.found.get("activations")
    record = {
        "plan": result.plan.to_dict(),
        "hash": result.plan.hash,
        "scores": dict(activations.search_scores) if activations else {},
        "measured": {
            "stages": {name: asdict(stage) for name, stage in result.stages.items()},
            "peak_memory": result.peak_memory,
            "peak_host": peak_process_memory(),
        },
        "files": [str(path) for path in result.files],
    }
    text = search_summary(result, options.output, verbose=options.verbose)
    return Answer(text, record, result.files)


def export(options: ExportOptions, draw: Drawing) -> Answer:
    """Write a plan as a GGUF file and check it."""
    from halfbyte.report.page import Exported, add_export
    from halfbyte.report.summary import checked_gguf, export_summary
    from halfbyte.targets.gguf_files.export import export_gguf

    result = export_gguf(options)
    exported = Exported(str(result.path), result.path.stat().st_size, checked_gguf(result))
    page = add_export(options.config, result.plan.hash, exported)
    record = {
        "path": str(result.path),
        "bytes": result.path.stat().st_size,
        "policy": result.policy,
        "kl": result.kl,
        "top1": result.top1,
        "plan": result.plan.hash,
    }
    text = export_summary(result, options.config, verbose=options.verbose)
    return Answer(text, record, [result.path, *([page] if page else [])])


def export_vllm(options: VllmExportOptions, draw: Drawing) -> Answer:
    """Write a plan as a folder for vLLM and check it."""
    from halfbyte.report.page import Exported, add_export
    from halfbyte.report.summary import checked_folder, vllm_export_summary
    from halfbyte.targets.vllm import TARGET

    result = TARGET.export(options)
    exported = Exported(str(result.path), result.nbytes, checked_folder(result))
    page = add_export(options.config, result.plan.hash, exported)
    record = {
        "path": str(result.path),
        "bytes": result.nbytes,
        "groups": result.groups,
        "difference": result.difference,
        "not_compared": result.skipped,
        "plan": result.plan.hash,
    }
    return Answer(vllm_export_summary(result, options.config), record, [result.path, *([page] if page else [])])


def compare(options: CompareOptions, draw: Drawing) -> Answer:
    """Original, Q4_K_M and mixed: speed, quality, memory."""
    from halfbyte.evaluate.compare import compare as run
    from halfbyte.report.page import add_comparison
    from halfbyte.report.summary import comparison_summary

    comparison = run(options)
    record = comparison.to_dict()
    page = add_comparison(options.config, record) if comparison.plan else None
    return Answer(comparison_summary(comparison, verbose=options.verbose), record, [page] if page else [])


def simulate(options: SimulateOptions, draw: Drawing) -> Answer:
    """The plan in PyTorch, beside the original, all A8 and all A4."""
    from halfbyte.evaluate.simulate import simulate as run
    from halfbyte.report.summary import simulation_summary

    result = run(options)
    return Answer(simulation_summary(result, verbose=options.verbose), result.to_dict())


def evaluate(options: EvalOptions, draw: Drawing) -> Answer:
    """Perplexity, KL and top-1 of a model, plan, GGUF file or served folder on any text."""
    from halfbyte.evaluate.evaluate import evaluate as run
    from halfbyte.report.summary import evaluation_summary

    result = run(options)
    return Answer(evaluation_summary(result), result.to_dict())


def imatrix(options: ImatrixOptions, draw: Drawing) -> Answer:
    """Measure an importance matrix for llama.cpp's tools."""
    from halfbyte.calibration.imatrix import make_imatrix
    from halfbyte.report.summary import imatrix_summary

    made = make_imatrix(options)
    record = {
        "path": options.output,
        "matrices": len(made.values),
        "tokens": made.tokens,
        "texts": list(made.texts),
    }
    return Answer(imatrix_summary(made), record, [Path(options.output)])


def report(options: ReportOptions, draw: Drawing) -> Answer:
    """One HTML page of a plan, or of several, and of comparisons."""
    from halfbyte.report.page import make_report

    path = make_report(options)
    return Answer("", {"path": str(path)}, [path])


def doctor(options: DoctorOptions, draw: Drawing) -> Answer:
    """What this machine can do."""
    from halfbyte.report.doctor import examine
    from halfbyte.report.summary import doctor_summary

    findings = examine(options)
    return Answer(doctor_summary(findings), {finding.topic: finding.text for finding in findings})


FEW_FILES = 4  # that are all named
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EFBIG)
ALIASES = {"export gguf": "export"}
COMMANDS: dict[str, tuple[type[CommandOptions], Callable[[Any, Drawing], Answer], str]] = {  # the last: where it is
    "search": (SearchOptions, search, "halfbyte.pipeline"),
    "export": (ExportOptions, export, "halfbyte.targets.gguf_files.export"),
    "export vllm": (VllmExportOptions, export_vllm, "halfbyte.targets.vllm"),
    "compare": (CompareOptions, compare, "halfbyte.evaluate.compare"),
    "simulate": (SimulateOptions, simulate, "halfbyte.evaluate.simulate"),
    "eval": (EvalOptions, evaluate, "halfbyte.evaluate.evaluate"),
    "imatrix": (ImatrixOptions, imatrix, "halfbyte.calibration.imatrix"),
    "report": (ReportOptions, report, "halfbyte.report.page"),
    "doctor": (DoctorOptions, doctor, "halfbyte.report.doctor"),
}


def run(command: str, arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one command; returns the exit code. This is what the four scripts call."""
    atexit.unregister(gc.freeze)  # once, also where commands follow each other
    atexit.register(gc.freeze)  # then what is left is not searched for cycles again, which takes a second
    with _ends_by_signal():
        return _run(command, sys.argv[1:] if arguments is None else arguments, prog)


def _run(command: str, arguments: Sequence[str], prog: str | None) -> int:
    options_type, work, module = COMMANDS[command]
    started = time.monotonic()
    draw: Drawing | None = None
    try:
        options = parse(options_type, arguments, prog=prog, about=str(work.__doc__))
        from halfbyte.report.terminal import Drawing

        draw = Drawing()
        draw.verbose = options.verbose
        _import_libraries(module)
        with listening(draw.report), speaking(options.lang):
            answer = work(options, draw)
            draw.finish(done=True)
            if not draw.quiet:
                _tell(answer, options, draw.warnings)
        return 0
    except HalfbyteError as error:
        line, code = f"error: {error}", 2
    except KeyboardInterrupt:
        again = "; go on with --resume" if command == "search" else ""
        seconds = time.monotonic() - started
        line, code = f"interrupted after {seconds:.0f} s, no partial output is left{again}", 2
    except OSError as error:
        where, ours = (f"{error.filename}: " if error.filename else ""), error.filename or error.errno in OF_THE_DISK
        hint = "; check the disk, its space and permissions" if ours else ""
        line, code = f"error: {where}{error.strerror or first_line(error)}{hint}", 2
    except Exception as error:  # noqa: BLE001 - the one place where what nobody foresaw becomes a line
        if _out_of_memory(error):
            line, code = "error: out of memory; use --dtype bf16, fewer tokens or a smaller model", 2
        else:
            line, code = f"error: this is a bug of halfbyte: {first_line(error)}; report it with {_saved(error)}", 1
    return _failed(draw, line, code)


@contextmanager
def _ends_by_signal() -> Iterator[None]:
    """SIGTERM, and SIGHUP where it is, end the command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    ours = [name for name in names if before[name] == signal.SIG_DFL]  # nohup ignores SIGHUP: that stays
    for name in ours:
        signal.signal(getattr(signal, name), interrupt)
    try:
        yield
    finally:
        for name in ours:
            signal.signal(getattr(signal, name), before[name])


def _saved(error: Exception) -> Path | str:
    """Where the traceback is kept."""
    text = f"halfbyte {__version__}, {sys.argv}\n{''.join(traceback.format_exception(error))}"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for place in (lambda: cache_folder() / "errors", lambda: Path(tempfile.gettempdir())):
        try:
            folder = place()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(
                f"halfbyte {__version__}, {sys.argv}\n{text}", encoding="utf-8", errors="replace"
            )
        except (OSError, RuntimeError):  # the latter: a user without a home
            continue
        return folder / name
    return f"this: {text.splitlines()[-1]}"


def _tell(answer: Answer, options: CommandOptions, warnings: Sequence[str]) -> None:
    files = named = [*answer.files]
    if len(files) > FEW_FILES and not options.verbose:
        named = [files[0], *(path for path in files if path.suffix == ".html")]
    if options.json is not None:
        write_text(options.json, json.dumps(answer.record, indent=1, default=str))
    try:
        if answer.text:
            print(answer.text)
        for note in dict.fromkeys(warnings):
            print(say("note: {text}", text=note))
        for path in [*named, *([Path(options.json)] if options.json else [])]:
            print(say("wrote {path}", path=path))
        if len(named) < len(files):
            print(say("wrote {count} more files beside them; --verbose names them", count=len(files) - len(named)))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has gone; what was to be written is there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(draw: Drawing | None, line: str, code: int) -> int:
    if draw is not None:
        draw.finish()
    with suppress(OSError):
        print(" ".join(line.split()), file=sys.stderr)
    return code


def _out_of_memory(error: Exception) -> bool:
    """Memory ran out, of the host or of the device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate" in str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """``halfbyte COMMAND …``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    lines = "\n".join(f"  {name:<11} {work.__doc__}" for name, (_, work, _) in COMMANDS.items())
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


def _import_libraries(module: str) -> None:
    """Import a command's module and what it needs, all at once: without looking for cycles a third faster.

    Libraries report through us; their own progress bars and warnings would break the drawing.
    """
    from halfbyte.core.environment import use_growing_segments

    for stream in (sys.stdout, sys.stderr):  # a redirected stream on Windows lacks some letters of the tables
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    use_growing_segments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    collects = gc.isenabled()
    gc.disable()
    try:
        import transformers

        importlib.import_module(module)
    finally:
        if collects:
            gc.enable()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
