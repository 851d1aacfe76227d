"""Twins of a folder: the same weights with all activations at 16, 8 or 4 bits, to find out what an engine runs.

Activation scales are chosen at run time, so twins differ in ``config.json`` only. An engine that answers the same to a
folder and to a twin computes the same with both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import write_error
from halfbyte.targets.served.folder import ServedFolder, matches

TWINS = {"w4a16": 16, "w4a8": 8, "w4a4": 4}
HUMMING_FILE = "humming-input.json"


def write_twins(folder: ServedFolder, output: str | Path) -> list[Path]:
    """Write the twins of ``folder`` into ``output``, which appears whole or not at all; shards are hard links.

    Beside them lies ``humming-input.json`` (see :func:`humming_input`) where vLLM can be told each layer's bits.

    Returns:
        The twins' folders, and the file if there is one.

    Raises:
        HalfbyteError: ``output`` exists, is inside the folder, or is on another disk (hard links need the same one).
    """
    output = Path(output)
    if output.exists():
        raise HalfbyteError(f"{output}: output already exists", fix="choose another name or remove it")
    if output.resolve().is_relative_to(folder.path.resolve()):
        raise HalfbyteError(f"{output}: output is inside the folder", fix="choose a name beside it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise write_error(error, output) from error
    try:
        written = [_write_twin(folder, partial / name, bits).name for name, bits in TWINS.items()]
        if settings := humming_input(folder):
            (partial / HUMMING_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")
            written.append(HUMMING_FILE)
        partial.chmod(0o755)
        partial.rename(output)
    except OSError as error:
        raise write_error(error, output) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [output / name for name in written]


def _write_twin(folder: ServedFolder, path: Path, a_bits: int) -> Path:
    path.mkdir()
    for source in folder.path.iterdir():
        if source.name == "config.json" or not source.is_file():
            continue
        try:
            os.link(source.resolve(), path / source.name)
        except OSError as error:
            raise HalfbyteError(
                f"{source}: cannot be linked, got {error.strerror or error}",
                fix="put the twins on the folder's disk; it must know hard links",
            ) from error
    text = json.dumps(twin_config(folder, a_bits), indent=2)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")
    return path


def twin_config(folder: ServedFolder, a_bits: int) -> dict[str, Any]:
    """``config.json`` with every group's activations at ``a_bits``: 4 or 8, symmetric per token, or 16 for none.

    Groups that then say the same become one that targets ``Linear``, where that means the same layers.
    """
    config = json.loads(json.dumps(folder.config))
    inputs = None
    if a_bits < 16:
        inputs = {"num_bits": a_bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = config["quantization_config"]["config_groups"]
    for group in groups.values():
        group["input_activations"] = inputs
    if _is_uniform(folder):
        name, group = next(iter(groups.items()))
        config["quantization_config"]["config_groups"] = {name: {**group, "targets": ["Linear"]}}
    return config


def _is_uniform(folder: ServedFolder) -> bool:
    """Whether one group of all linear layers says what the folder's groups say of the weights."""
    groups = list(folder.quantisation["config_groups"].values())
    ignore = folder.quantisation.get("ignore") or ()
    return all(group["weights"] == groups[0]["weights"] for group in groups) and all(
        any(matches(entry, name, "") for entry in ignore) for name in folder.unquantised
    )


def humming_input(folder: ServedFolder) -> dict[str, Any] | None:
    """What ``VLLM_HUMMING_INPUT_QUANT_CONFIG`` must say so that the W4A16 twin runs each layer at the folder's bits.

    For ``vllm serve TWIN --quantization humming`` on an Nvidia GPU (vLLM ``layers/quantization/humming.py``): an
    explicit type is not replaced by a faster one. That method looks at one config group only, the one that targets
    ``Linear``, and at no transforms.

    Returns:
        The settings, or None where they would not fit: groups whose weights differ, layers that are not rounded,
        transforms at run time.
    """
    rounded = {layer.a_bits for layer in folder.layers}
    if not rounded or not rounded <= {4, 8} or folder.transforms or not _is_uniform(folder):
        return None
    usual = max(rounded)
    other = dict.fromkeys(layer.module for layer in folder.layers if layer.a_bits != usual)
    dynamic = {f"+:{re.escape(module)}$": {"dtype": f"int{min(rounded)}"} for module in other}
    return {"dtype": f"int{usual}", "quant_mode": "dynamic_token", **({"dynamic": dynamic} if dynamic else {})}
