"""The demo: sensitivity, A4/A8 search, types, export, simulation and comparison on the real SmolLM2-135M-Instruct.

Runs the four commands as a user would and prints each one before it starts. Everything is written to the current
folder. Texts, generations and menus are smaller than by default, so that it ends in about six minutes on two CPU cores.
The model's channels are rescaled when it is loaded (``rescale_`` in ``halfbyte/models/modules.py``): its weights were
Q4_1 once, and would flatter that format.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from halfbyte.plan import load_plan
from halfbyte.report.page import PAGE
from halfbyte.report.search_reports import beside
from halfbyte.report.tables import text_table

ROOT = Path(__file__).resolve().parent.parent
TEXT = "pydoc"  # offline; the same text wherever the version of Python is the same
SCORED = f"--text {TEXT},code --ctx 256 --chunks 8"
PLAN, MIXED = "mixed_precision_config.pt", "models/smollm2-135m-mixed.gguf"
COMMANDS = [
    "mixed_precision_ptq.py --model_id demo --device cpu --ga_pop 10 --ga_gen 3 --transforms smooth,r2 "
    f"--calib {TEXT} --ctx 256 --search_tokens 128 --calib_tokens 2048 --output {PLAN} --force",
    f"export_gguf_official.py --config {PLAN} --output {MIXED} --force",
    f"test_mixed_precision.py --config {PLAN} {SCORED} --max_tokens 30 --json simulation.json --force",
    f"compare_real_quant.py --config {PLAN} --mixed_path {MIXED} {SCORED} --max_tokens 40 --json comparison.json "
    "--force",
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
    print("\nA4/A8: KL to the original in nats per token, W4 weights, a budget of 6 activation bits on average\n")
    print(choices())
    print(f"\nall of it on one page, for a browser:\n  {beside(Path.cwd() / PLAN, PAGE)}")
    print(f"\nthe demo took {time.monotonic() - started:.0f} s; everything is in {Path.cwd()}")
    return 0


def choices() -> str:
    """Who got 8 bits, by whom: KL on the search text, and on text that the search has not seen."""
    search = load_plan(PLAN, with_codes=False).search
    rows = [[label, score, search["validation"][label]] for label, score in search["scores"].items()]
    return text_table(["choice", "search text", "validation text"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
