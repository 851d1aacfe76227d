"""Hostile input by the thousand: flags, model folders, plans, GGUF files, work folders, outputs that collide.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--kinds NAME ...] [--json OUT]

Every case takes files that are good, damages or crosses something, and runs one command in this process on a tiny model
with random weights that is made on the spot. Counted is what must never happen: a bug of halfbyte (exit code 1 or an
exception), a message of more than one line, exit 0 over damaged input whose result is wrong, a file of somebody else
that has changed, a file that is left over, code that was run. A case is named by its seed and number, and
``--only NUMBER`` runs it alone. Kinds are those of ``KINDS``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from common import Row, Rows, parse, run
from fuzz_cases import KINDS, Case, World, make_template, within

from halfbyte import cli
from halfbyte.report.tables import markdown_table

NOBODY = 65534  # the user of that name
REFUSED = "refused"  # exit code 2, which is right
FAULTS = ("bug", "several lines", "false success", "foreign file", "left over", "code run")


@contextlib.contextmanager
def hindered(case: Case) -> Iterator[None]:
    """As the case wants it."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if case.largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.largest_file, usual[1]))
        if case.as_nobody and os.geteuid() == 0:
            os.seteuid(NOBODY)
        yield
    finally:
        if case.as_nobody and os.geteuid() == NOBODY:
            os.seteuid(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def snapshot(folder: Path) -> dict[str, str]:
    """Path -> digest of all files, links as they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def faults_of(world: World, case: Case) -> tuple[list[str], str]:
    """Run a case; what went wrong, and what was said."""
    before = snapshot(world.folder)
    out, err = io.StringIO(), io.StringIO()
    code: int | str
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), hindered(case):
            code = cli.main([*case.command.split(), *case.arguments])
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:  # noqa: BLE001 - nothing may come through
        code = f"{type(error).__name__}: {error}"
    found = []
    if code not in (0, 2):
        found.append("bug")
    said = [line for line in err.getvalue().splitlines() if line.strip() and not line.lstrip().startswith("[")]
    if code == 2 and len(said) != 1:
        found.append("several lines")
    after = snapshot(world.folder)
    if code == 0 and case.damaged:
        found.append("false success")
    kept = ("foreign.txt", "model/", "m.gguf", "i.gguf", ".new.json.work/foreign.txt", "served/foreign.txt")
    changed = [name for name in before if before[name] != after.get(name)]
    named = {word.rpartition("=")[2] for word in case.arguments} if "--force" in case.arguments else set()
    if any(name.startswith(kept) and (name not in named or name.startswith("model/")) for name in changed):
        found.append("foreign file")
    if any(".partial" in name or name.endswith(".lock") or ".old" in name for name in after if name not in before):
        found.append("left over")
    if "ran" in after:
        found.append("code run")
    return found, f"exit {code}: {err.getvalue().strip()[-400:]}{_where(said) if code == 1 else ''}"


def _where(said: list[str]) -> str:
    """The last places of the traceback that a bug has left."""
    saved = Path(said[-1].rpartition(" ")[2]) if said else Path()
    if not saved.is_file():
        return ""
    return "".join(f"\n    {line.strip()}" for line in saved.read_text().splitlines()[-9:])


def main() -> int:
    """Run the cases and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="NAME")
    parser.add_argument("--only", type=int, help="run the case of this number alone, and say what it was")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.set_defaults(resume=False)
    options = parse(parser)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    started, counts, ran = time.monotonic(), Counter[tuple[str, str]](), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HALFBYTE_CACHE"] = str(Path(scratch) / "cache")
        template = Path(scratch) / "template"
        template.mkdir()
        Path(scratch).chmod(0o755)  # another user passes through
        make_template(template)
        numbers = range(options.cases) if options.only is None else [options.only]
        for number in numbers:
            if time.monotonic() - started > options.seconds:
                break
            chance = random.Random(f"{options.seed}/{number}")
            name = options.kinds[number % len(options.kinds)]
            world = World(Path(scratch) / f"case-{number}", template)
            shutil.copytree(template, world.folder, symlinks=True)
            with within(world.folder):
                case = KINDS[name](world, chance)
                found, said = faults_of(world, case)
            if world.small.is_mount():
                subprocess.run(["umount", str(world.small)], check=True)
            shutil.rmtree(world.folder, ignore_errors=True)
            ran[name] += 1
            counts[name, REFUSED] += said.startswith("exit 2")
            for fault in found:
                counts[name, fault] += 1
            if found or options.only is not None:
                print(
                    f"case {number} ({name}): {', '.join(found)}: {case.command} {case.arguments}: {said}", flush=True
                )
    made_by = {"seed": options.seed, "seconds": time.monotonic() - started}
    rows = Rows(options, made_by)
    for name in ran:
        row: Row = {"kind": name, "cases": ran[name], **{what: counts[name, what] for what in (REFUSED, *FAULTS)}}
        rows.add(row)
    columns = ["cases", REFUSED, *FAULTS]
    total = {"kind": "all", **{what: sum(row[what] for row in rows) for what in columns}}
    print(markdown_table(["kind", *columns], [[*row.values()] for row in [*rows, total]]))
    return 1 if any(total[fault] for fault in FAULTS) else 0


if __name__ == "__main__":
    run(main)
