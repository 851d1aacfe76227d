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
import json
import os
import random
import resource
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from common import Row, Rows, parse, run
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from halfbyte import cli
from halfbyte.report.tables import markdown_table

QUICK = ["--device", "cpu", "--ctx", "32", "--calib_tokens", "64", "--search_tokens", "64", "--ga_pop", "2"]
QUICK += ["--ga_gen", "1", "--calib", "pydoc", "--weights", "rtn", "--transforms", "none", "--refine", "0"]
SCORED = ["--ctx", "16", "--chunks", "1", "--text", "pydoc", "--device", "cpu"]
NOBODY = 65534  # the user of that name
REFUSED = "refused"  # exit code 2, which is right
FAULTS = ("bug", "several lines", "false success", "foreign file", "left over", "code run")
STRANGE: tuple[Any, ...] = (None, True, -1, 0, 1, 2**70, 0.5, "", "x", "a/b", [], {}, [[]], float("nan"), 1e400)
WORDS = (
    "",
    " ",
    "0",
    "-1",
    "1",
    "nan",
    "inf",
    "1e9",
    "9" * 30,
    "auto",
    "demo",
    "x",
    "/",
    ".",
    "..",
    "~",
    "~x",
    "/dev/null",
)
WORDS += ("a\nb", "ä", "\u202e", "%s", "{0}", "a" * 300, "/proc/self/mem", "*", "Q4_K_M", "gptq", "none", "--help")


@dataclass
class Case:
    """One command, in a folder of its own.

    Attributes:
        command, arguments: what is run.
        damaged: whether exit code 0 would be wrong.
        largest_file: bytes that a file may have while it runs, as if the disk were full then.
        as_nobody: it is run as another user; only root can do that, others run it as they are.
    """

    command: str
    arguments: list[str]
    damaged: bool = False
    largest_file: int | None = None
    as_nobody: bool = False


@dataclass
class World:
    """What cases start from: a good model, a good plan, a good GGUF file, a good imatrix."""

    folder: Path
    template: Path
    commands: dict[str, type] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.folder / "model"


def make_template(folder: Path) -> None:
    """A tiny model, and what the commands make of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(wrapped) + 8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    wrapped.save_pretrained(folder / "model")
    (folder / "foreign.txt").write_text("somebody's only copy")
    with within(folder):
        for command, arguments in (
            ("search", ["--model_id", "model", "--output", "plan.json", "--spaces", "activations", *QUICK]),
            ("search", ["--model_id", "model", "--output", "types.json", "--spaces", "types", "--bpw", "9", *QUICK]),
            ("export", ["--config", "plan.json", "--output", "m.gguf", "--no-check"]),
            ("imatrix", ["--model_id", "model", "--output", "i.gguf", *QUICK[:6], "--calib", "pydoc"]),
        ):
            arguments = (
                [word for word in arguments if word not in ("--search_tokens",)] if command == "imatrix" else arguments
            )
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                if cli.run(command, arguments) != 0:
                    raise SystemExit(f"the good files cannot be made: {said.getvalue()}")


def flags_case(world: World, chance: random.Random) -> Case:
    """A command with flags that have any value."""
    command = chance.choice(list(cli.COMMANDS))
    kind = cli.COMMANDS[command][0]
    arguments = {"search": ["--model_id", "model", *QUICK], "imatrix": ["--model_id", "model"]}.get(command, [])
    arguments = [*arguments]
    for _ in range(chance.randint(1, 3)):
        item = chance.choice(fields(kind))
        arguments.append(f"--{item.name}")
        if not isinstance(item.default, bool):
            value = chance.choice((*WORDS, "plan.json", "m.gguf", "model", "foreign.txt", "out/x.pt"))
            if item.name == "model_id" and "/" in value:  # no question to the hub
                value = "model"
            arguments[-1] += f"={value}"
    if command in ("compare", "simulate", "eval"):
        arguments += ["--ctx", "16", "--chunks", "1", "--text", "pydoc"]
    if command in ("compare", "eval", "doctor") and not any("model_id" in word for word in arguments):
        arguments += ["--model_id", "model"]
    if command in ("compare", "simulate"):
        arguments += ["--max_tokens", "1"]
    return Case(command, arguments)


def model_case(world: World, chance: random.Random) -> Case:
    """A model folder with one thing wrong."""
    file = world.model / chance.choice([path.name for path in world.model.iterdir()])
    if file.suffix == ".json" and chance.random() < 0.7:
        change_json(file, chance)
        gone = False
    else:
        gone = change_bytes(file, chance)
    if chance.random() < 0.1:
        gone = False
        evil = json.loads((world.template / "model" / "config.json").read_text())
        evil |= {"_attn_implementation": "somebody/kernel", "auto_map": {"AutoConfig": "evil.Config"}}
        (world.model / "config.json").write_text(json.dumps(evil))
        (world.model / "evil.py").write_text("from pathlib import Path\nPath('ran').write_text('')\n")
    needed = gone and file.name in ("config.json", "model.safetensors", "tokenizer.json")
    return chance.choice(
        (
            Case("doctor", ["--model_id", "model"], gone and file.name == "config.json"),
            Case("search", ["--model_id", "model", "--output", "new.json", "--spaces", "activations", *QUICK], needed),
            Case("eval", ["--model_id", "model", *SCORED], needed),
            Case("export", ["--config", "plan.json", "--output", "new.gguf", "--no-check"], needed),
        )
    )


def plan_case(world: World, chance: random.Random) -> Case:
    """A plan, or the codes beside it, with one thing wrong."""
    plan, codes = chance.choice((("plan.json", "plan.safetensors"), ("types.json", "types.types.safetensors")))
    if chance.random() < 0.6:
        change_json(world.folder / plan, chance)
        damaged = False
    else:
        codes = world.folder / codes
        change_bytes(codes, chance)
        damaged = not codes.is_file() or codes.read_bytes() != (world.template / codes.name).read_bytes()
    scored = ["--config", plan, *SCORED]
    return chance.choice(
        (
            Case("export", ["--config", plan, "--output", "new.gguf", "--no-check"], damaged),
            Case("simulate", [*scored, "--max_tokens", "1"], damaged),
            Case("eval", scored, damaged),
        )
    )


def gguf_case(world: World, chance: random.Random) -> Case:
    """A GGUF file or an importance matrix with one thing wrong, most often in its header."""
    matrix = chance.random() < 0.4
    change_bytes(world.folder / ("i.gguf" if matrix else "m.gguf"), chance, header=chance.random() < 0.8)
    if matrix:
        arguments = ["--model_id", "model", "--output", "new.json", "--spaces", "types", "--imatrix", "i.gguf", *QUICK]
        return Case("search", arguments)
    return chance.choice((Case("eval", ["--model_id", "m.gguf", *SCORED]), Case("doctor", ["--model_id", "m.gguf"])))


def outputs_case(world: World, chance: random.Random) -> Case:
    """Outputs that are inputs, other outputs, strangers' files, or in places that cannot be."""
    places = ["plan.json", "plan.safetensors", "m.gguf", "model", "model/config.json", "model/x.json", "foreign.txt"]
    places += ["new.json", "new/deep/er.json", "foreign.txt/x.json", "model/model.safetensors", ".new.json.work/a.json"]
    places += [
        "link.json",
        "circle.json",
        "x" * 250 + ".json",
        "/dev/null",
        "/proc/x.json",
        "./new.json",
        "model/../plan.json",
    ]
    (world.folder / "link.json").symlink_to("plan.json")
    (world.folder / "circle.json").symlink_to("circle.json")
    force = ["--force"] if chance.random() < 0.5 else []
    output, record = chance.choice(places), chance.choice(places)
    more = [*force, *(["--json", record] if chance.random() < 0.7 else [])]
    return chance.choice(
        (
            Case("search", ["--model_id", "model", "--output", output, "--spaces", "activations", *QUICK, *more]),
            Case("export", ["--config", "plan.json", "--output", output, "--no-check", *more]),
            Case("imatrix", ["--model_id", "model", "--output", output, "--ctx", "32", "--calib_tokens", "64", *more]),
            Case("doctor", ["--model_id", "model", *more]),
            Case("export vllm", ["--config", "plan.json", "--output", output, *more]),
        )
    )


def work_case(world: World, chance: random.Random) -> Case:
    """A work folder of an interrupted search with one thing wrong."""
    work = world.folder / ".new.json.work"
    if chance.random() < 0.3:
        work.mkdir()
        name = chance.choice(("settings.json", "foreign.txt", "codes.safetensors", "prepared.json"))
        (work / name).write_bytes(chance.randbytes(chance.randint(0, 200)))
        if name == "foreign.txt":
            (work / name).write_text("somebody's only copy")
    else:
        interrupt(world, chance)
        inside = [path for path in work.rglob("*") if path.is_file()] if work.exists() else []
        if inside:
            file = chance.choice(inside)
            change_json(file, chance) if file.name == "settings.json" else change_bytes(file, chance)
    arguments = ["--model_id", "model", "--output", "new.json", "--spaces", "activations", *QUICK]
    return Case("search", [*arguments, chance.choice(("--resume", "--force"))])


def text_case(world: World, chance: random.Random) -> Case:
    """A text to calibrate on that is none."""
    text = world.folder / "t.txt"
    data = chance.choice(
        (
            b"",
            b" \n" * chance.randint(1, 5000),
            chance.randbytes(chance.randint(1, 5000)),
            b"\xff\xfe" + b"a\0" * 500,
            b"x" * chance.randint(1, 200_000),
            b"\0" * 5000,
            "半".encode() * chance.randint(1, 20_000),
            b"word\n" * chance.randint(1, 2000),
        )
    )
    text.write_bytes(data)
    name = chance.choice(("t.txt", "t.txt,pydoc", "t.txt,t.txt", ",", "t.txt,", "nothing.txt", "model"))
    return Case(
        "search", ["--model_id", "model", "--output", "new.json", "--spaces", "activations", *QUICK, "--calib", name]
    )


def disk_case(world: World, chance: random.Random) -> Case:
    """A disk that is full at any byte."""
    spaces = chance.choice((["activations"], ["types", "--bpw", "9"]))
    case = chance.choice(
        (
            Case("search", ["--model_id", "model", "--output", "new.json", "--spaces", *spaces, *QUICK]),
            Case("export", ["--config", "plan.json", "--output", "new.gguf", "--no-check", "--json", "new.json"]),
            Case("imatrix", ["--model_id", "model", "--output", "new.gguf", "--ctx", "32", "--calib_tokens", "64"]),
        )
    )
    case.largest_file = int(10 ** chance.uniform(0, 6))
    return case


def permissions_case(world: World, chance: random.Random) -> Case:
    """Files and folders that may not be read or written, as another user."""
    inside = [path for path in (world.folder, *world.folder.rglob("*")) if not path.is_symlink()]
    for path in inside:
        path.chmod(0o777 if path.is_dir() else 0o666)
    for path in chance.sample(inside, k=min(len(inside), chance.randint(1, 3))):
        path.chmod(chance.choice((0o000, 0o444, 0o555)))
    case = outputs_case(world, chance) if world.folder.stat().st_mode & 0o200 else text_case(world, chance)
    case.as_nobody = True
    return case


KINDS: dict[str, Callable[[World, random.Random], Case]] = {
    "flags": flags_case,
    "models": model_case,
    "plans": plan_case,
    "gguf": gguf_case,
    "outputs": outputs_case,
    "work": work_case,
    "texts": text_case,
    "disk": disk_case,
    "permissions": permissions_case,
}


def change_json(path: Path, chance: random.Random) -> None:
    """Replace, remove or add one value somewhere in a JSON file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    at: Any = data
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and chance.random() < 0.8:
            at = at[key]
            continue
        break
    how = chance.random()
    if how < 0.7:
        at[key] = chance.choice(STRANGE)
    elif how < 0.9:
        del at[key]
    elif isinstance(at, dict):
        at["unknown"] = chance.choice(STRANGE)
    path.write_text(json.dumps(data), encoding="utf-8")


def change_bytes(path: Path, chance: random.Random, *, header: bool = True) -> bool:
    """Cut, flip, overwrite, remove, or replace a file by something else; whether nothing of it is left."""
    data = bytearray(path.read_bytes())
    how = chance.randrange(6)
    end = min(len(data), 400) if header else len(data)
    if how == 0:
        path.write_bytes(data[: chance.randrange(len(data) + 1)])
    elif how == 1 and data:
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(end)] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    elif how == 2 and len(data) > 16:
        at = chance.randrange(end - 8)
        data[at : at + 8] = struct.pack("<Q", chance.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
        path.write_bytes(data)
    elif how == 3:
        path.unlink()
    elif how == 4:
        path.unlink()
        chance.choice((path.mkdir, lambda: path.symlink_to(path.name), lambda: path.symlink_to("/dev/null")))()
    else:
        path.write_bytes(chance.randbytes(chance.randint(0, 100)))
    return how >= 3


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    """In another working folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


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


def interrupt(world: World, chance: random.Random) -> None:
    """Let a search of this model end early."""
    from halfbyte.core.progress import listening
    from halfbyte.options import SearchOptions
    from halfbyte.pipeline import search

    left = chance.randint(3, 9)

    def stop(_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    given = dict(zip([word[2:] for word in QUICK[::2]], QUICK[1::2], strict=True))
    numbers = {name: int(value) for name, value in given.items() if value.isdigit()}
    options = {**given, **numbers, "model_id": "model", "output": "new.json", "spaces": "activations"}
    with contextlib.suppress(KeyboardInterrupt), listening(stop):
        search(SearchOptions(**options))


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
    kept = ("foreign.txt", "model/", "m.gguf", "i.gguf", ".new.json.work/foreign.txt")
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
