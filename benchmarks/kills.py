"""Commands that are killed at random moments: the same plan, and nothing left over, after they go on.

    python benchmarks/kills.py [--kills 100] [--work NAME ...] [--seed 0] [--json OUT]

A command (a search with ``--resume``) runs on the model of ``benchmarks/fuzz.py`` in a process of its own and gets
kill -9 or SIGTERM after a random part of the time that an undisturbed run took, until one run comes to its end. Then
the plan must be that of the undisturbed run, the file have the same bytes, and the folder hold nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Rows, parse, run
from fuzz_cases import make_template

from halfbyte.core.files import sha256
from halfbyte.plan import load_plan

SMALL = ["--device", "cpu", "--ctx", "64", "--calib_tokens", "512", "--search_tokens", "256", "--ga_pop", "6"]
SMALL += ["--ga_gen", "4", "--calib", "pydoc", "--granularity", "layer"]
COMPARED = ["--q4km_path", "../m.gguf", "--mixed_path", "../m.gguf", "--text", "pydoc", "--ctx", "64", "--chunks", "8"]
OUTPUTS = {"search": "plan.json", "export vllm": "folder", "compare": "result.json"}
WORK = {
    "search, types": ("search", ["--spaces", "types", "--bpw", "9"]),
    "search, activations": ("search", ["--spaces", "activations"]),
    "search, tune": ("search", ["--target", "sim", "--tune", "8"]),
    "search, vllm": ("search", ["--target", "vllm", "--hardware", "ada", "--granularity", "fused"]),
    "export to GGUF": ("export", ["--config", "../exported.json", "--no-check"]),
    "export for vLLM": ("export vllm", ["--config", "../ada.json"]),
    "imatrix": ("imatrix", ["--model_id", "../model", "--ctx", "64", "--calib_tokens", "4096", "--calib", "pydoc"]),
    "compare": ("compare", ["--config", "../exported.json", "--skip_original", *COMPARED, "--force"]),
}


def start(command: str, arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    whole = [sys.executable, "-m", "halfbyte", *command.split(), *arguments]
    return subprocess.Popen(whole, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said."""
    said = process.communicate()[1]
    return process.returncode, said


def result_of(command: str, output: Path) -> object:
    """What must be the same every time: the plan, or the bytes; of a comparison, which has times in it, its keys."""
    if command == "search":
        return load_plan(output)
    if command == "compare":
        return sorted(json.loads(output.read_text()))
    if output.is_dir():
        return {path.name: sha256(path) for path in output.iterdir()}
    return sha256(output)


def main() -> int:
    """Kill, and count what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.set_defaults(resume=False)
    options = parse(parser)
    chance, rows = random.Random(options.seed), Rows(options, {"seed": options.seed})
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        make_template(base)
        model = str(base / "model")
        for name, more in (("exported.json", ["--spaces", "activations"]), ("ada.json", WORK["search, vllm"][1])):
            plan = ["--model_id", model, *SMALL, *more, "--output", name, "--force"]
            code, said = ended(start("search", plan, base))  # names the model by its whole path
            if code != 0:
                raise SystemExit(f"the plan to export cannot be made: {said}")
        share = max(1, options.kills // len(options.work))
        for name in options.work:
            command, more = WORK[name]
            given = [*(["--model_id", model, *SMALL] if command == "search" else []), *more]
            output = OUTPUTS.get(command, "m.gguf")
            named = "--json" if command == "compare" else "--output"
            folder = base / "undisturbed"
            folder.mkdir()
            started = time.monotonic()
            code, said = ended(start(command, [*given, named, output], folder))
            took = time.monotonic() - started
            if code != 0:
                raise SystemExit(f"{name}: the undisturbed run failed: {said}")
            expected = sorted(path.name for path in folder.iterdir())
            whole = result_of(command, folder / output)
            kills, runs, faults = 0, 0, 0
            while kills < share:
                work = base / f"work-{runs}"
                work.mkdir()
                runs += 1
                while True:
                    again = ["--resume"] if command == "search" else []
                    process = start(command, [*given, named, output, *again], work)
                    number = chance.choice((signal.SIGKILL, signal.SIGTERM))
                    try:
                        process.wait(timeout=chance.uniform(0.1, 1.1) * took)
                    except subprocess.TimeoutExpired:
                        process.send_signal(number)
                        kills += 1
                    code, said = ended(process)
                    if code == 0 or (code == 2 and "output already exists" in said):  # killed when all was written
                        break
                    # In the middle of exec of a string (dataclasses) CPython ends with SIGINT, though it was handled.
                    told = code in (2, -signal.SIGINT) and "interrupted after" in said
                    stopped = code == -signal.SIGKILL or told
                    if "Traceback" in said or not (stopped or code == -signal.SIGTERM):  # before our handler is there
                        faults += 1
                        print(f"{name}: exit {code}: {said[-300:]}", flush=True)
                        break
                there = sorted(path.name for path in work.iterdir())
                found = result_of(command, work / output)
                if found != whole or there != expected:
                    faults += 1
                    print(f"{name}: another result, or left over: {set(there) ^ set(expected)}", flush=True)
                shutil.rmtree(work)
            rows.add({"what": name, "kills": kills, "completed": runs, "faults": faults})
            print(f"{name}: {kills} kills in {runs} runs that were brought to an end, {faults} faults", flush=True)
            wrong += faults
            shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
