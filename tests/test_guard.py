"""No command writes over what it reads, over a stranger's file, or where another run is writing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfbyte import cli
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import MANIFEST, scratch_folder, whole_folder
from halfbyte.core.guard import Touched, guarded
from tests.command_line import fails
from tests.searches import wait_until

HOLD = "import sys, time\nfrom pathlib import Path\nfrom halfbyte.core.guard import Touched, guarded\n"
HOLD += "with guarded(Touched(outputs=[Path(sys.argv[1])]), json=None, force=False):\n"
HOLD += "    print('held', flush=True)\n    time.sleep(60)\n"


def guard(*, json_file=None, force=True, **touched):
    with guarded(Touched(**touched), json=json_file, force=force):
        pass


def refused(match, **arguments):
    with pytest.raises(HalfbyteError, match=match):
        guard(**arguments)


def test_two_outputs_in_one_file(tmp_path):
    plan, link = tmp_path / "plan.pt", tmp_path / "link.json"
    link.symlink_to(plan)
    for other in (plan, tmp_path / "sub" / ".." / "plan.pt", link):
        refused("two outputs in one file", outputs=[plan], json_file=str(other))
    plan.write_text("old")
    hard = tmp_path / "hard.json"
    os.link(plan, hard)
    refused("two outputs in one file", outputs=[plan], json_file=str(hard))
    refused("an output in the folder of another", folder=tmp_path / "out", json_file=str(tmp_path / "out" / "r.json"))
    refused("an output in the folder of another", work=tmp_path / ".w", outputs=[tmp_path / ".w" / "settings.json"])


def test_an_output_that_is_an_input(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    other = tmp_path / "other"
    other.symlink_to(model)
    for output in (model / "model.safetensors", model / "model.pt", other / "config.json"):
        refused("would be written into", outputs=[output], inputs=[str(model)])
    refused("would be written over", folder=model, inputs=[str(model)])
    refused("holds .*, which is read", folder=tmp_path, inputs=[str(model)])
    refused("would be written over", inputs=[model / "model.safetensors"], json_file=str(model / "model.safetensors"))
    assert (model / "model.safetensors").read_text() == "weights"
    guard(inputs=[str(model)], outputs=[model / "plan.pt"])  # new, and nothing that a loader takes for its own
    guard(inputs=["Qwen/Qwen2.5-7B-Instruct"], outputs=[tmp_path / "plan.pt"])


def test_what_is_no_plain_file_stays(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refused("no plain file", outputs=[fifo])
    refused("no plain file", outputs=[Path("/dev/null")])
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    refused("already exists", outputs=[dangling], force=False)
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    refused("already exists", outputs=[circle], force=False)


def test_a_folder_with_strange_files_is_not_replaced(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    guard(folder=folder)  # an empty one may be
    (folder / "config.json").write_text("{}")
    refused("what halfbyte did not write, got config.json", folder=folder)
    (folder / MANIFEST).write_text(json.dumps({"files": ["config.json"]}))
    guard(folder=folder)
    (folder / "notes.txt").write_text("mine")
    refused("what halfbyte did not write, got notes.txt", folder=folder)
    (folder / "notes.txt").unlink()
    for damaged in ("[]", "{", '{"files": 3}', '{"files": [["a"]]}'):
        (folder / MANIFEST).write_text(damaged)
        refused("what halfbyte did not write", folder=folder)


def test_folders_that_were_made_go_if_nothing_came_of_them(tmp_path):
    with pytest.raises(ValueError), guarded(Touched(outputs=[tmp_path / "a" / "p.pt"]), json=None, force=False):  # noqa: PT011
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    refused("cannot be", outputs=[tmp_path / "file" / "plan.pt"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_run_is_told_and_a_dead_one_is_taken_over(tmp_path):
    output = tmp_path / "plan.pt"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused("another run is writing it now", outputs=[output])
        refused("another run is writing it now", outputs=[output.with_suffix(".json")])  # they share the codes
        guard(outputs=[tmp_path / "other.pt"])
    finally:
        holder.kill()
        holder.wait()
    output.write_text("a plan")
    assert (tmp_path / ".plan.lock").exists()
    refused("already exists", outputs=[output], force=False)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]  # the lock of the dead has gone
    output.unlink()
    for left in (".plan.pt.123.partial.pt", ".plan.pt.123.partial"):
        (tmp_path / left).write_text("half")
    guard(outputs=[output])
    assert list(tmp_path.iterdir()) == []


def test_of_three_at_once_one_writes(tmp_path):
    folder, done = tmp_path / "out", tmp_path / "done"
    folder.mkdir()
    hold = HOLD.replace("time.sleep(60)", f"[time.sleep(0.05) for _ in iter(Path({str(done)!r}).exists, True)]")
    start = [sys.executable, "-c", hold, str(folder / "plan.pt")]
    runs = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        wait_until(lambda: sum(run.poll() is not None for run in runs) == 2)
        done.touch()
        said = [run.communicate(timeout=60) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert sorted(run.returncode for run in runs) == [0, 1, 1]
    assert sorted(out for out, _ in said) == ["", "", "held\n"]
    assert sum("another run is writing it now" in err for _, err in said) == 2
    assert list(folder.iterdir()) == []


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    folder = tmp_path / "out"
    (tmp_path / ".out.123.old").mkdir()
    (tmp_path / ".out.123.old" / "config.json").write_text("{}")
    (tmp_path / ".out.123.old" / MANIFEST).write_text('{"files": ["config.json"]}')
    (tmp_path / ".out.123.partial").mkdir()
    guard(folder=tmp_path / "elsewhere")
    assert not folder.exists()
    refused("already exists", folder=folder, force=False)
    with guarded(Touched(folder=folder), json=None, force=True):
        assert (folder / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_locks_are_of_places_and_leftovers_of_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guard(folder=tmp_path / "q", json_file="q.json")
    guard(outputs=[tmp_path / "p.gguf"], json_file="p.json")
    other = tmp_path / ".Qwen2.5-7B.123.old"
    other.mkdir()
    guard(folder=tmp_path / "Qwen2")
    assert other.exists()


def test_a_result_is_written_into_a_new_folder(tiny_folder, tmp_path):
    record = tmp_path / "new" / "deep" / "r.json"
    assert cli.run("doctor", ["--model_id", str(tiny_folder("qwen2")), "--json", str(record)]) == 0
    assert json.loads(record.read_text())


def test_scratch_folders_of_the_dead_go(tmp_path):
    dead, alone = tmp_path / "halfbyte-dead", tmp_path / "halfbyte-of-somebody"
    for folder in (dead, alone):
        folder.mkdir()
    owner = dead / ".owner"
    owner.write_text("")
    os.utime(owner, (time.time() - 60, time.time() - 60))
    with scratch_folder(tmp_path) as mine:
        os.utime(mine / ".owner", (time.time() - 60, time.time() - 60))
        with scratch_folder(tmp_path) as other:
            assert mine.exists()
            assert other.exists()
        assert not dead.exists()
    assert [path.name for path in tmp_path.iterdir()] == [alone.name]


def test_commands_refuse_before_any_work(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_folder("qwen2")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    quick = ["--model_id", str(model), "--device", "cpu", "--calib", "pydoc", "--force"]
    for command, arguments in (
        ("search", [*quick, "--output", str(model / "model.json")]),
        ("search", [*quick, "--json", "mixed_precision_config.safetensors"]),
        ("search", [*quick, "--json", str(model / "config.json")]),
        ("imatrix", [*quick, "--output", str(model / "model.safetensors")]),
        ("imatrix", [*quick, "--output", "i.gguf", "--json", "i.gguf"]),
        ("eval", ["--model_id", str(model), "--json", str(model / "config.json"), "--force"]),
        ("doctor", ["--model_id", str(model), "--json", str(model / "config.json"), "--force"]),
    ):
        fails(capsys, cli.run(command, arguments), match=": ")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_a_work_folder_of_somebody_else_stays(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    work = tmp_path / ".plan.json.work"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    arguments = ["--model_id", str(tiny_folder("qwen2")), "--device", "cpu", "--calib", "pydoc", "--force"]
    fails(capsys, cli.run("search", [*arguments, "--output", "plan.json"]), match="no work folder of halfbyte")
    assert (work / "thesis.txt").read_text() == "mine"


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(HalfbyteError, match="cannot be written"), whole_folder(tmp_path / "out") as partial:
        (partial / "sub").mkdir()  # a folder cannot be synced as a file
    assert list(tmp_path.iterdir()) == []
