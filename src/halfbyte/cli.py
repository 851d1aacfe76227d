"""The command line: parse, call the library, print what came of it, exit codes.

    halfbyte search | export [gguf] | export vllm | compare | simulate | eval | imatrix | doctor

Exit codes: 0 done, 2 something the user can put right (one line on standard error, Ctrl-C included).
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import __version__
from halfbyte.arguments import parse
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_output, write_text
from halfbyte.core.progress import listening
from halfbyte.options import (
    CommandOptions,
    CompareOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    ImatrixOptions,
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
            "seconds": draw.seconds,
            "peak_memory": result.peak_memory,
            "preparation_memory": result.preparation_memory,
            "peak_host": peak_process_memory(),
        },
        "files": [str(path) for path in result.files],
    }
    return Answer(search_summary(result, draw.seconds), record, result.files)


def export(options: ExportOptions, draw: Drawing) -> Answer:
    """Write a plan as a GGUF file and check it."""
    from halfbyte.report.summary import export_summary
    from halfbyte.targets.gguf_files.export import export_gguf

    result = export_gguf(options)
    record = {
        "path": str(result.path),
        "bytes": result.path.stat().st_size,
        "policy": result.policy,
        "kl": result.kl,
        "top1": result.top1,
        "plan": result.plan.hash,
    }
    return Answer(export_summary(result), record, [result.path])


def export_vllm(options: VllmExportOptions, draw: Drawing) -> Answer:
    """Write a plan as a folder for vLLM and check it."""
    from halfbyte.report.summary import vllm_export_summary
    from halfbyte.targets.vllm import TARGET

    result = TARGET.export(options)
    record = {
        "path": str(result.path),
        "bytes": result.nbytes,
        "groups": result.groups,
        "difference": result.difference,
        "not_compared": result.skipped,
        "plan": result.plan.hash,
    }
    return Answer(vllm_export_summary(result), record, [result.path])


def compare(options: CompareOptions, draw: Drawing) -> Answer:
    """Original, Q4_K_M and mixed: speed, quality, memory."""
    from halfbyte.evaluate.compare import compare as run
    from halfbyte.report.summary import comparison_summary

    comparison = run(options)
    return Answer(comparison_summary(comparison), comparison.to_dict())


def simulate(options: SimulateOptions, draw: Drawing) -> Answer:
    """The plan in PyTorch, beside the original, all A8 and all A4."""
    from halfbyte.evaluate.simulate import simulate as run
    from halfbyte.report.summary import simulation_summary

    result = run(options)
    return Answer(simulation_summary(result), result.to_dict())


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


def doctor(options: DoctorOptions, draw: Drawing) -> Answer:
    """What this machine can do."""
    from halfbyte.report.doctor import examine
    from halfbyte.report.summary import doctor_summary

    findings = examine(options)
    return Answer(doctor_summary(findings), {finding.topic: finding.text for finding in findings})


ALIASES = {"export gguf": "export"}
COMMANDS: dict[str, tuple[type[CommandOptions], Callable[[Any, Drawing], Answer]]] = {
    "search": (SearchOptions, search),
    "export": (ExportOptions, export),
    "export vllm": (VllmExportOptions, export_vllm),
    "compare": (CompareOptions, compare),
    "simulate": (SimulateOptions, simulate),
    "eval": (EvalOptions, evaluate),
    "imatrix": (ImatrixOptions, imatrix),
    "doctor": (DoctorOptions, doctor),
}


def run(command: str, arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one command; returns the exit code. This is what the four scripts call."""
    options_type, work = COMMANDS[command]
    options = parse(options_type, sys.argv[1:] if arguments is None else arguments, prog=prog, about=str(work.__doc__))
    from halfbyte.report.terminal import Drawing

    draw = Drawing()
    started = time.monotonic()
    try:
        _quiet_libraries()
        _check_json(options)
        with listening(draw.report):
            answer = work(options, draw)
        draw.finish()
        if not draw.quiet:
            _tell(answer, options.json)
    except HalfbyteError as error:
        return _failed(draw, f"error: {error}")
    except KeyboardInterrupt:
        again = "; go on with --resume" if command == "search" else ""
        seconds = time.monotonic() - started
        return _failed(draw, f"interrupted after {seconds:.0f} s, no partial output is left{again}")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _failed(draw, "error: out of memory; use --dtype bf16, fewer tokens or a smaller model")
    return 0


def _check_json(options: CommandOptions) -> None:
    """Refuse, before any work, a ``--json`` file that exists, cannot be written, or is another output too."""
    if options.json is None:
        return
    check_output(options.json, force=options.force)
    output = getattr(options, "output", None)
    if output is not None and Path(options.json).resolve() == Path(output).resolve():
        raise HalfbyteError(f"{options.json}: two outputs in one file", fix="give --json another name")


def _tell(answer: Answer, record: str | None) -> None:
    files = [*answer.files]
    if record is not None:
        write_text(record, json.dumps(answer.record, indent=1, default=str))
        files.append(Path(record))
    print(answer.text)
    for path in files:
        print(f"wrote {path}")


def _failed(draw: Drawing, line: str) -> int:
    draw.finish()
    print(line, file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    """Memory ran out, of the host or of the device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "allocate" in str(error)


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


def _quiet_libraries() -> None:
    """Libraries report through us; their own progress bars and warnings would break the drawing."""
    from halfbyte.core.environment import use_growing_segments

    for stream in (sys.stdout, sys.stderr):  # a redirected stream on Windows lacks some letters of the tables
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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
