"""Models and text from the hub by the real client: first and later runs, refusals, damage, new states, no network."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from halfbyte.calibration.text import pydoc_text
from tests.hub import Hub, hub_at_work

ROOT = Path(__file__).parent.parent
ID = "somebody/Tiny-Instruct"
LOAD = "import sys, torch\nfrom halfbyte.models.loading import find, load\n"
LOAD += "from halfbyte.core.errors import HalfbyteError\n"
LOAD += "try:\n    print(load(find(sys.argv[1]), device=torch.device('cpu'), dtype=torch.float32).fingerprint)\n"
LOAD += "except HalfbyteError as error:\n    sys.exit(f'error: {error}')\n"
SMALL = ["--ctx", "64", "--calib_tokens", "128", "--search_tokens", "128", "--ga_pop", "4", "--ga_gen", "1"]
QUICK = ["--device", "cpu", *SMALL]
SCORED = ["--ctx", "64", "--chunks", "2"]


@pytest.fixture
def hub(tiny_folder):
    with hub_at_work() as at_work:
        at_work.add(ID, tiny_folder("qwen2"))
        yield at_work


def python(hub: Hub, folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A process with a cache of its own in ``folder``, for which the hub is the stand-in."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HALFBYTE_CACHE": str(folder / "cache")}
    environment = {**kept, **own, "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    arguments = [sys.executable, *command]
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_four_commands_from_an_id(hub, tmp_path, tiny_folder):
    """As users run them: a sharded model and wikitext2 from the hub, then everything again without a connection."""
    from transformers import AutoModelForCausalLM

    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2")).save_pretrained(shards, max_shard_size="300KB")
    own = hub.repos[ID]
    del own["model.safetensors"]
    own |= {path.name: path.read_bytes() for path in shards.iterdir()}
    assert sum(name.endswith(".safetensors") for name in own) > 1
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for part in ("train", "test"):
            file.writestr(f"wikitext-2-raw/wiki.{part}.raw", pydoc_text())
    hub.repos["datasets/ggml-org/ci"] = {"wikitext-2-raw-v1.zip": archive.getvalue()}
    mixed = "models/tiny-mixed.gguf"
    offline: dict[str, str] = {}
    for command in (
        ["mixed_precision_ptq.py", "--model_id", ID, *QUICK],
        ["export_gguf_official.py", "--output", mixed],
        ["compare_real_quant.py", "--max_tokens", "4", *SCORED],
        ["test_mixed_precision.py", "--max_tokens", "4", "--device", "cpu", *SCORED],
    ):
        done = python(hub, tmp_path, str(ROOT / command[0]), *command[1:], **offline)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        offline = {"HF_HUB_OFFLINE": "1"}  # from here on the cache has it all
    assert (tmp_path / mixed).exists()
    assert (tmp_path / "models" / "Tiny-Instruct-Q4_K_M.gguf").exists()
    assert set(hub.asked.values()) == {1}  # nothing twice
    text = json.loads(python(hub, tmp_path, "-c", PLAN_TEXT).stdout)
    assert text["name"] == "wikitext2,code"


PLAN_TEXT = "import json\nfrom halfbyte.plan import load_plan\n"
PLAN_TEXT += "print(json.dumps(load_plan('mixed_precision_config.pt').text))"


def test_a_connection_that_drops_goes_on(hub, tmp_path):
    hub.dropped.add("model.safetensors")
    done = python(hub, tmp_path, "-c", LOAD, ID)
    assert done.returncode == 0, done.stderr
    assert hub.asked["model.safetensors"] == 2


def test_a_wrong_checksum_is_refused_and_not_kept(hub, tmp_path):
    hub.wrong.add("model.safetensors")
    done = python(hub, tmp_path, "-c", LOAD, ID)
    assert "model.safetensors: download is damaged" in done.stderr
    hub.wrong.clear()
    assert python(hub, tmp_path, "-c", LOAD, ID).returncode == 0


@pytest.mark.parametrize("status", [401, 403])
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, status):
    hub.refused[ID] = status
    done = python(hub, tmp_path, "-m", "halfbyte", "doctor", "--model_id", ID)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: {ID}: ")


def test_without_a_connection_and_a_cache(hub, tmp_path):
    done = python(hub, tmp_path, "-c", LOAD, ID, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {ID}: model configuration cannot be read")
    assert not hub.asked


def test_a_state_that_changes_after_the_search_is_refused(hub, tmp_path, tiny_folder):
    arguments = ["--model_id", ID, *QUICK, "--calib", "pydoc", "--transforms", "none", "--weights", "rtn"]
    assert python(hub, tmp_path, str(ROOT / "mixed_precision_ptq.py"), *arguments).returncode == 0
    hub.add(ID, tiny_folder("qwen2", seed_of_weights=7))
    done = python(hub, tmp_path, str(ROOT / "export_gguf_official.py"), "--output", "m.gguf")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "made for another model" in done.stderr or "fingerprint" in done.stderr, done.stderr
    assert not (tmp_path / "m.gguf").exists()
