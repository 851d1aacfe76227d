"""A command ends done, with one line that the user can act on, or with one that names a saved traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfbyte import cli
from halfbyte.calibration.text import split
from halfbyte.evaluate.worker import run_command
from halfbyte.options import EvalOptions, SearchOptions
from tests.command_line import QUICK, fails
from tests.searches import Process, flags, wait_until

SLEEPER = "import json, sys, time\nfrom halfbyte.evaluate.worker import end_with_parent\nend_with_parent()\n"
SLEEPER += "print(json.dumps({'progress': {'stage': 'here', 'done': 0, 'total': 1, 'note': ''}}), flush=True)\n"
SLEEPER += "time.sleep(60)\n"


def test_what_nobody_foresaw_is_one_line_and_a_file(monkeypatch, capsys, tmp_path):
    def broken(*_):
        raise KeyError("a\nb")

    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "doctor", (cli.DoctorOptions, broken, "halfbyte.report.doctor"))
    assert cli.run("doctor", []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (saved,) = (tmp_path / "errors").iterdir()
    assert "a bug of halfbyte" in line
    assert str(saved) in line
    assert "KeyError" in saved.read_text()


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    command = f"{sys.executable} -m halfbyte doctor --model_id demo | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_line():
    command = f"{sys.executable} -m halfbyte doctor > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_as_ctrl_c_does(tiny_folder, tmp_path, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored, as nohup wants it")
    arguments = [*flags(tiny_folder("qwen2"), "gguf", ga_gen=300), "--output", str(tmp_path / "plan.json")]
    process = Process(arguments, tmp_path)
    work = tmp_path / ".plan.json.work"
    wait_until(lambda: (work / "prepared.json").exists() or not process.running())
    assert process.stop(number) == 2
    assert "interrupted after" in process.err
    assert "Traceback" not in process.err
    assert [path.name for path in tmp_path.iterdir()] == [work.name]


def test_a_worker_ends_with_its_parent(tmp_path):
    """kill -9 of the one that started it: what it had started ends too."""
    code = (
        "import sys\nfrom halfbyte.evaluate.worker import run_command\nfrom halfbyte.core.progress import listening\n"
    )
    code += f"sleeper = {SLEEPER!r} + '#{tmp_path}'\n"
    code += "with listening(lambda _: print('started', flush=True)):\n"
    code += "    run_command([sys.executable, '-c', sleeper], where='x')\n"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"

    def workers() -> int:
        found = subprocess.run(["pgrep", "-f", f"time.sleep.*#{tmp_path}"], capture_output=True, text=True).stdout
        return len([number for number in found.split() if number != str(parent.pid)])

    assert workers() == 1
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while workers() and time.monotonic() < end:
        time.sleep(0.1)
    assert workers() == 0


def test_an_interrupted_worker_ends(tmp_path):
    started = time.monotonic()

    def stop(_):
        raise KeyboardInterrupt

    from halfbyte.core.progress import listening

    with pytest.raises(KeyboardInterrupt), listening(stop):
        run_command([sys.executable, "-c", SLEEPER], where="x")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("command", "arguments", "match"),
    [
        ("search", ["--seed", "-1"], "--seed: out of range, expected 0 to 2,147,483,647, got -1"),
        ("search", ["--calib_tokens", "-1"], "--calib_tokens: out of range"),
        ("search", ["--ctx", "0"], "--ctx: out of range, expected 1 to 131,072, got 0"),
        ("search", ["--target_compression", "nan"], "--target_compression: out of range, expected 0 to 2, got nan"),
        ("search", ["--size", "5GiB", "--like", "Q4_K_M"], "--size, --ftype: one excludes the other"),
        ("search", ["--size", "0"], "--size: not a size"),
        ("search", ["--size", "9" * 400], "--size: not a size"),
        ("search", ["--output", ""], "--output: expected the name of a file or folder, got an empty one"),
        ("search", ["--output", "x" * 300 + ".pt"], "--output: name is too long"),
        ("search", ["--output", "~nobody-has-this-name/x.pt"], "--output: no user has this home folder"),
        ("search", ["--model_id", "a\0b"], "--model_id: not a text"),
        ("search", ["--calib", os.fsdecode(b"\xff")], "--calib: not a text"),
        ("export vllm", ["--shard_size", "5 bananas"], "--shard_size: not a size"),
        ("compare", ["--max_tokens", "0"], "--max_tokens: out of range, expected 1 to 131,072, got 0"),
        ("compare", ["--max_tokens", "999999999"], "--max_tokens: out of range"),
        ("simulate", ["--max_tokens", "0"], "--max_tokens: out of range"),
        ("eval", ["--gguf", ""], "--gguf: expected the name of a file or folder"),
        ("eval", ["--gguf", "a.gguf", "--served", "b"], "one excludes the other"),
        ("eval", ["--ctx", "3"], "--ctx: out of range, expected 4 to 131,072, got 3"),
        ("eval", ["--threads", "-1"], "--threads: out of range"),
        ("doctor", ["--model_id", "nope"], "nope: no such model"),
        ("search", ["--ga_pop", "many"], "invalid int value: 'many'"),
    ],
)
def test_what_a_flag_may_be_is_checked_first(capsys, tmp_path, monkeypatch, command, arguments, match):
    monkeypatch.chdir(tmp_path)
    fails(capsys, cli.run(command, arguments), match=match)
    assert list(tmp_path.iterdir()) == []


def test_home_folders_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SearchOptions(output="~/plan.pt").output == str(tmp_path / "plan.pt")
    assert EvalOptions(gguf="~/m.gguf").gguf == str(tmp_path / "m.gguf")


def test_texts_without_line_ends_and_without_words(tiny_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = split("word " * 280_000)  # one line of 1.4 MB
    assert all(len(part) > 100_000 for part in parts.values())
    Path("empty.txt").write_text(" \n\t\n" * 1000)
    arguments = ["--model_id", str(tiny_folder("qwen2")), *QUICK, "--calib", "empty.txt"]
    fails(capsys, cli.run("search", arguments), match="the text is empty")
