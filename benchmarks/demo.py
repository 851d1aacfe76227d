"""The demo: sensitivity, search, export, simulation and comparison on the real SmolLM2-135M-Instruct.

Runs the four commands as a user would and prints each one before it starts. Everything is written to the current
folder. The search is smaller than the default one, so that it ends within ten minutes on two CPU cores.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = "pydoc"  # offline; the same text wherever the version of Python is the same
PLAN, MIXED = "mixed_precision_config.pt", "models/smollm2-135m-mixed.gguf"
COMMANDS = [
    "mixed_precision_ptq.py --model_id demo --device cpu --spaces ggml --ga_pop 12 --ga_gen 3 "
    f"--calib {TEXT} --search_tokens 256 --calib_tokens 4096 --output {PLAN} --force",
    f"export_gguf_official.py --config {PLAN} --output {MIXED} --force",
    f"test_mixed_precision.py --config {PLAN} --text {TEXT} --chunks 4 --max_tokens 40 --json simulation.json --force",
    f"compare_real_quant.py --config {PLAN} --mixed_path {MIXED} --text {TEXT} --chunks 8 --max_tokens 60 "
    "--json comparison.json --force",
]


def main() -> int:
    """Run the commands; stop at the first that fails."""
    started = time.monotonic()
    for command in COMMANDS:
        print(f"\n$ python {command}", flush=True)
        script, *arguments = command.split()
        code = subprocess.call([sys.executable, str(ROOT / script), *arguments])
        if code:
            return code
    print(f"\nfiles in {Path.cwd()}:")
    for path in sorted(Path.cwd().rglob("*")):
        if path.is_file():
            print(f"  {path.relative_to(Path.cwd())}  {path.stat().st_size / 1e6:.2f} MB")
    print(f"\nthe demo took {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
