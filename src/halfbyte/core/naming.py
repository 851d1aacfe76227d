"""Default file names, so that one command finds what another wrote."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("models")
DEMO_NAME = "SmolLM2-135M-Instruct"  # what ``--model_id demo`` is


def short_name(model_id: str) -> str:
    """``Qwen/Qwen2.5-7B-Instruct`` -> ``Qwen2.5-7B-Instruct``; of a file, its name without suffix."""
    if model_id == "demo":
        return DEMO_NAME
    path = Path(model_id)
    return path.stem if path.suffix == ".gguf" else path.name


def is_hub_id(model_id: str) -> bool:
    """Whether it looks like ``owner/name``, and not like something on this machine."""
    path = Path(model_id)
    return len(path.parts) == 2 and not path.is_absolute() and path.suffix != ".gguf" and not path.exists()


def mixed_gguf(model_id: str) -> Path:
    """Where the mixed GGUF file of a model goes: ``models/qwen2.5-7b-mixed.gguf``."""
    return FOLDER / f"{short_name(model_id).lower().removesuffix('-instruct')}-mixed.gguf"


def mixed_folder(model_id: str) -> Path:
    """Where the folder for vLLM goes: ``models/qwen2.5-7b-mixed-vllm``."""
    return mixed_gguf(model_id).with_name(f"{mixed_gguf(model_id).stem}-vllm")


def q4km_gguf(model_id: str) -> Path:
    """Where its Q4_K_M file is looked for: the name that download repositories use, in whatever letter case."""
    path = FOLDER / f"{short_name(model_id)}-Q4_K_M.gguf"
    found = sorted(FOLDER.glob("*.gguf")) if not path.exists() else []
    return next((other for other in found if other.name.lower() == path.name.lower()), path)


def f16_gguf(model_id: str) -> Path:
    """Where the original as F16 GGUF goes."""
    return FOLDER / f"{short_name(model_id)}-F16.gguf"


def download_command(model_id: str) -> str:
    """How to get a ready Q4_K_M file of a model from the hub."""
    name = short_name(model_id)
    return f"hf download bartowski/{name}-GGUF {name}-Q4_K_M.gguf --local-dir {FOLDER}"
