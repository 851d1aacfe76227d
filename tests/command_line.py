"""What the tests of the commands share: quick settings, a search, one line of error."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from halfbyte import cli

ROOT = Path(__file__).parent.parent
QUICK = ["--device", "cpu", "--calib", "pydoc", "--ctx", "64", "--calib_tokens", "128", "--search_tokens", "128"]
CODES = "mixed_precision_config.safetensors"
EVAL = ["--text", "pydoc", "--ctx", "64", "--chunks", "2", "--max_tokens", "4"]
GA = ["--ga_pop", "6", "--ga_gen", "3"]
ACTIVATIONS = ["--spaces", "activations"]  # the last flag counts


def search(folder, *more):
    return cli.run("search", ["--model_id", str(folder), *QUICK, *GA, *ACTIVATIONS, *more])


def changed(folder, tmp_path_factory, *names, factor):
    """A copy of a saved model with some tensors multiplied."""
    copied = shutil.copytree(folder, tmp_path_factory.mktemp("changed") / "m")
    tensors = load_file(copied / "model.safetensors")
    for name in names:
        tensors[name] *= factor
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def fails(capsys, code, *, match):
    captured = capsys.readouterr()
    assert code == 2
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert match in lines[0], lines[0]
