"""The hostile cases of ``benchmarks/fuzz.py``: each kind takes good files and damages, crosses or forbids one thing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from halfbyte import cli
from halfbyte.core.progress import listening
from halfbyte.options import SearchOptions
from halfbyte.pipeline import search

QUICK = ["--device", "cpu", "--ctx", "32", "--calib_tokens", "64", "--search_tokens", "64", "--ga_pop", "2"]
QUICK += ["--ga_gen", "1", "--calib", "pydoc", "--weights", "rtn", "--transforms", "none", "--refine", "0"]
ADA = ["--target", "vllm", "--hardware", "ada"]
SCORED = ["--ctx", "16", "--chunks", "1", "--text", "pydoc", "--device", "cpu"]
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
SMALL = "small"
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
    """What cases start from: a good model, good plans, a good GGUF file, imatrix and folder for vLLM."""

    folder: Path
    template: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def small(self) -> Path:
        """Where a small file system is mounted, if one is."""
        return self.folder / SMALL


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
            (
                "search",
                ["--model_id", "model", "--output", "ada.json", "--target", "vllm", "--hardware", "ada", *QUICK],
            ),
            ("export vllm", ["--config", "ada.json", "--output", "served"]),
        ):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                if cli.run(command, arguments) != 0:
                    raise SystemExit(f"the good files cannot be made: {said.getvalue()}")


def flags_case(world: World, chance: random.Random) -> Case:
    """A command with flags that have any value."""
    command = chance.choice(list(cli.COMMANDS))
    kind = cli.COMMANDS[command][0]
    usual = {"search": ["--model_id", "model", *QUICK], "imatrix": ["--model_id", "model"]}
    arguments = [*usual.get(command, [])]
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
        config = world.model / "config.json"
        if config.is_symlink():  # to itself, by now
            config.unlink()
        config.write_text(json.dumps(evil))
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


def served_case(world: World, chance: random.Random) -> Case:
    """A folder for vLLM with one thing wrong, as what is measured, as a model and as an output; and a strange vLLM."""
    served = world.folder / "served"
    file = served / chance.choice([path.name for path in served.iterdir()])
    change_json(file, chance) if file.suffix == ".json" and chance.random() < 0.7 else change_bytes(file, chance)
    if chance.random() < 0.2:
        (served / "foreign.txt").write_text("somebody's only copy")
    python = world.folder / "python"  # answers as one that has vLLM, or in another way
    answer = chance.choice(("echo 0.26.0", "echo", "exit 3", "kill -9 $$", "echo x >&2; exit 1", "printf '\\377\\n{'"))
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    asked = ["--served", "served", "--serve_python", chance.choice(("./python", "python", "nothing"))]
    files = ["--config", "ada.json", "--skip_original", "--q4km_path", "m.gguf", "--mixed_path", "m.gguf"]
    return chance.choice(
        (
            Case("eval", ["--model_id", "model", *asked, *SCORED]),
            Case("compare", [*files, *asked, *SCORED, "--max_tokens", "1", "--json", "new.json"]),
            Case("export vllm", ["--config", "ada.json", "--output", "served", "--force"]),
            Case("search", ["--model_id", "served", "--output", "new.json", "--spaces", "activations", *QUICK]),
            Case("doctor", ["--model_id", "served"]),
        )
    )


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
    """A disk that is full at any byte: by a limit on the size of files, or, for root, a file system of that size."""
    spaces = chance.choice((["activations"], ["types", "--bpw", "9"]))
    case = chance.choice(
        (
            Case("search", ["--model_id", "model", "--output", "new.json", "--spaces", *spaces, *QUICK]),
            Case("export", ["--config", "plan.json", "--output", "new.gguf", "--no-check", "--json", "new.json"]),
            Case("imatrix", ["--model_id", "model", "--output", "new.gguf", "--ctx", "32", "--calib_tokens", "64"]),
            Case("export vllm", ["--config", "ada.json", "--output", "new.folder"]),
        )
    )
    size = int(10 ** chance.uniform(0, 6))
    if chance.random() < 0.5 or not mounted(world.small, size):
        case.largest_file = size
    else:
        case.arguments = [f"{SMALL}/{word}" if word.startswith("new.") else word for word in case.arguments]
    return case


def mounted(folder: Path, size: int) -> bool:
    """Whether a file system of so many bytes, in whole pages, is there now; only root may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0


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
    "served": served_case,
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


def interrupt(world: World, chance: random.Random) -> None:
    """Let a search of this model end early."""
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
