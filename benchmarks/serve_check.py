"""What vLLM really ran: log-probabilities of a folder against those of its twins.

    halfbyte doctor --served DIR --twins TWINS
    python benchmarks/serve_check.py DIR TWINS --python ENV/bin/python

ENV is an environment with vLLM (`benchmarks/serve_env.py` makes one for the CPU). Each folder is loaded by a process of
its own, so a GPU must hold one of them only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from halfbyte.targets.served.report import ran_as
from halfbyte.targets.served.twins import TWINS

WORKER = Path(__file__).with_name("serve_worker.py")
PROMPT = (
    "A binary search finds a value in a sorted list. It looks at the middle element first. If that is larger than the "
    "value, the value can only be in the first half, otherwise in the second. So each step halves what is left."
)


def main() -> None:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("twins", type=Path)
    parser.add_argument("--python", default=sys.executable, help="of the environment with vLLM")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("more", nargs=argparse.REMAINDER, help="after --: further options of serve_worker.py")
    arguments = parser.parse_args()
    folders = {"folder": arguments.folder, **{name: arguments.twins / name for name in TWINS}}
    answers = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in folders.items():
            print(f"{name}: {folder} …", flush=True)
            made = Path(scratch) / f"{name}.json"
            command = [arguments.python, str(WORKER), str(folder), "--prompt", arguments.prompt, "--json", str(made)]
            done = subprocess.run([*command, *arguments.more[1:]], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{done.stderr[-2000:]}\nvLLM could not answer for {folder}")
            answer = json.loads(made.read_text(encoding="utf-8"))
            answers[name] = answer["answers"][str(folder)]["logprobs"]
            print(f"  {len(answers[name])} tokens; {'; '.join(answer['kernels']) or 'no kernel was named'}")
    verdict = ran_as(answers.pop("folder"), answers)
    for name, value in verdict.distances.items():
        print(f"  {name}: {value:.2e} nats per token away")
    print(verdict.text)


if __name__ == "__main__":
    main()
