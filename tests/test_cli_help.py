"""What the flags are called, what the help says, and that neither it nor the import takes long."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import halfbyte
from halfbyte import cli
from halfbyte.arguments import parse
from halfbyte.options import CompareOptions, EvalOptions, ExportOptions, SearchOptions, SimulateOptions
from tests.command_line import ROOT


@pytest.mark.parametrize("code", ["import halfbyte", "from halfbyte import cli; cli.main(['search', '--help'])"])
def test_neither_the_import_nor_the_help_waits_for_torch(code):
    check = f"import sys, atexit\natexit.register(lambda: print('torch' in sys.modules))\n{code}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_package_of_the_evaluation_and_the_function_share_a_name():
    """Whatever was imported before, ``halfbyte.evaluate`` is the function."""
    code = "import halfbyte.evaluate.worker, halfbyte; print(callable(halfbyte.evaluate))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "halfbyte", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == halfbyte.__version__


def test_the_help_shows_what_matters_first(capsys):
    with pytest.raises(SystemExit):
        cli.main(["search", "--help"])
    _, options, *groups = re.split(r"^(?=\S.*:$)", capsys.readouterr().out, flags=re.MULTILINE)
    first = re.findall(r"^  --(\w+)", options, flags=re.MULTILINE)
    assert len(first) <= 12
    assert {"model_id", "target", "output", "target_compression", "ga_pop", "ga_gen", "device", "resume"} <= set(first)
    assert [group.partition(":")[0] for group in groups] == [
        "model and device",
        "transforms and weights",
        "search",
        "text",
        "output",
    ]


def test_older_names_of_flags_still_work(capsys):
    asked = parse(SearchOptions, ["--like", "Q5_K_M", "--spaces", "ggml"], prog=None, about="")
    assert (asked.ftype, asked.spaces) == ("Q5_K_M", "ggml")
    with pytest.raises(SystemExit):
        cli.main(["search", "--help"])
    assert "--like" not in capsys.readouterr().out


def test_help_and_unknown_command(capsys):
    assert cli.main([]) == 0
    assert cli.main(["frobnicate"]) == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["search", "--help"])
    assert stop.value.code == 0
    assert cli.main(["search", "--no_such_flag"]) == 2
    assert capsys.readouterr().err.count("\n") == 2  # a line each


def test_the_contract_of_flags():
    """Names and defaults that users know."""
    assert SearchOptions().ga_pop == 30
    assert SearchOptions().ga_gen == 0  # what the machine can do
    assert SearchOptions().target_compression == 0  # the target's own, 0.75 but on Hopper
    assert SearchOptions().model_id == "Qwen/Qwen2.5-7B-Instruct"
    assert SearchOptions().output == ExportOptions().config == SimulateOptions().config == "mixed_precision_config.pt"
    assert CompareOptions().max_tokens == 200
    assert SearchOptions().calib_tokens == SearchOptions().search_tokens == 0  # what the machine can do
    assert {"skip_original", "q4km_path", "mixed_path", "json"} <= set(CompareOptions.__dataclass_fields__)
    assert {"model_id", "config", "gguf", "text", "ctx", "chunks", "json"} <= set(EvalOptions.__dataclass_fields__)
    for script in ("mixed_precision_ptq", "export_gguf_official", "compare_real_quant", "test_mixed_precision"):
        done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert "--json" in done.stdout
