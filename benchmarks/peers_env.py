"""An environment for llm-compressor beside ours: it wants another transformers than we do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PINS = {
    "torch": "2.13.0",
    "llmcompressor": "0.14.0.1",
    "compressed-tensors": "0.19.0",
    "transformers": "5.17.0",
    "gguf": "0.19.0",  # for halfbyte, which scores the answers there
}
ASK = "import sys; from importlib.metadata import version; print(*(version(name) for name in sys.argv[1:]))"


def peer_python(folder: Path) -> Path:
    """The Python of the environment in ``folder``, which is made and filled if need be (1.5 GB without CUDA).

    pip's own settings decide where packages come from. A torch that is there already and has the right version stays,
    so a CPU-only one can be installed first.

    Raises:
        SystemExit: pip could not install the pinned versions.
    """
    python = virtual_environment(folder)
    if _installed(python) != list(PINS.values()):
        print(f"installing llm-compressor {PINS['llmcompressor']} into {folder} …", flush=True)
        pins = [f"{name}=={version}" for name, version in PINS.items()]
        if subprocess.call([str(python), "-m", "pip", "install", "--quiet", *pins]):
            raise SystemExit(f"pip could not install {' '.join(pins)} into {folder}")
    return python


def virtual_environment(folder: Path) -> Path:
    """The Python of a virtual environment in ``folder``, which is made if it is not there."""
    folder = folder.absolute()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    return python


def _installed(python: Path) -> list[str]:
    """Versions of the pinned packages without their build tags (2.13.0 for 2.13.0+cpu); empty if one is missing."""
    done = subprocess.run([str(python), "-c", ASK, *PINS], capture_output=True, text=True)
    return [version.partition("+")[0] for version in done.stdout.split()] if done.returncode == 0 else []
