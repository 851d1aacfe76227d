"""Whatever is wrong is one line with exit code 2, and nothing half done stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte import cli
from halfbyte.core import files
from tests.command_line import QUICK, ROOT, changed, fails, search


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_resume_with_other_settings_is_refused(tiny_folder, here, capsys):
    folder = tiny_folder("qwen2")
    work = here / ".mixed_precision_config.pt.work"
    work.mkdir()
    (work / "settings.json").write_text(json.dumps({"seed": 1}))
    (work / "codes.safetensors").write_text("")
    fails(capsys, search(folder, "--resume"), match="the interrupted search had other settings")
    fails(capsys, search(folder), match="an interrupted search is waiting")
    assert search(folder, "--force") == 0


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_is_one_line(tiny_folder, here):
    command = [sys.executable, str(ROOT / "mixed_precision_ptq.py"), "--model_id", str(tiny_folder("qwen2")), *QUICK]
    process = subprocess.Popen(
        [*command, "--ga_gen", "500", "--verbose"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell starts jobs with it ignored
    )
    while "transforms and W4 codes" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "interrupted after" in err
    assert "Traceback" not in err
    assert not Path("mixed_precision_config.pt").exists()


def test_bad_values(tiny_folder, here, capsys):
    folder = str(tiny_folder("qwen2"))
    for arguments, match in [
        (["--target_compression", "0.4"], "budget is out of range, expected 0.5 (all A4) to 1 (all A8), got 0.4"),
        (["--target_compression", "1.01"], "budget is out of range"),
        (["--output", "plan.yaml"], "unknown plan format"),
        (["--transforms", "rotated"], "unknown transform"),
        (["--transforms", "smooth,online"], "the target gguf cannot run this transform"),
        (["--alpha", "2"], "--alpha: out of range, expected 0 to 1, or auto, got 2"),
        (["--ga_pop", "0"], "--ga_pop: out of range, expected 2 to 100,000, got 0"),
        (["--calib", "nowhere.txt"], "no such text"),
        (["--group_size", "16"], "Q4_0 blocks need groups of 32"),
        (["--json", "mixed_precision_config.pt"], "two outputs in one file"),
        (["--model_id", "missing/folder/x"], "no such model"),
    ]:
        fails(capsys, cli.run("search", ["--model_id", folder, *QUICK, *arguments]), match=match)
        assert list(here.iterdir()) == []


def test_existing_output_is_not_overwritten(tiny_folder, here, capsys):
    Path("mixed_precision_config.pt").write_text("precious")
    fails(capsys, search(tiny_folder("qwen2")), match="output already exists")
    assert Path("mixed_precision_config.pt").read_text() == "precious"
    assert search(tiny_folder("qwen2"), "--force") == 0
    assert cli.run("export", ["--output", "m.gguf"]) == 0
    capsys.readouterr()
    fails(capsys, cli.run("export", ["--output", "m.gguf"]), match="output already exists")


def test_unwritable_folder(tiny_folder, here, capsys):
    blocker = here / "file"
    blocker.write_text("")
    fails(capsys, search(tiny_folder("qwen2"), "--output", "file/plan.pt"), match="folder cannot be written")


def test_text_too_short(tiny_folder, here, capsys):
    Path("short.txt").write_text("too short\n" * 8)
    fails(capsys, search(tiny_folder("qwen2"), "--calib", "short.txt"), match="text is shorter than one window")
    assert [path.name for path in here.iterdir()] == ["short.txt"]


def test_full_disk_is_one_line_and_leaves_nothing(tiny_folder, here, capsys, monkeypatch):
    """The W4 codes meet a full disk (a link to /dev/full stands for it)."""
    from halfbyte.prepare import walk

    def full(path, *_):
        with files.whole_file(path) as partial:
            partial.symlink_to("/dev/full")
            partial.write_bytes(b"x" * 100_000)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(walk, "save_codes", full)
    fails(capsys, search(tiny_folder("qwen2")), match="disk is full")
    assert list(here.iterdir()) == []


def test_plan_of_another_model(tiny_folder, here, capsys):
    assert search(tiny_folder("qwen2")) == 0
    capsys.readouterr()
    other = str(tiny_folder("qwen2", seed_of_weights=1))
    fails(
        capsys,
        cli.run("export", ["--output", "m.gguf", "--model_id", other]),
        match="the plan was made for another model",
    )
    fails(capsys, cli.run("simulate", ["--model_id", other]), match="the plan was made for another model")
    assert not Path("m.gguf").exists()


def test_plan_for_the_simulation_is_not_exported(tiny_folder, here, capsys):
    assert search(tiny_folder("qwen2"), "--target", "sim") == 0
    fails(capsys, cli.run("export", ["--output", "m.gguf"]), match="search again with --target gguf")


def test_activations_that_overflow_name_the_layer(tiny_folder, here, capsys, tmp_path_factory):
    hot = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    folder = changed(tiny_folder("llama"), tmp_path_factory, *hot, factor=1e25)
    fails(capsys, search(folder), match="model.layers.0.mlp.down_proj: activations are not finite")
    assert list(here.iterdir()) == []
