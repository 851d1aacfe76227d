"""A folder with a quantised checkpoint: its config and its tensors, mapped, read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from halfbyte.errors import HalfbyteError, first_line
from halfbyte.files import sha256
from halfbyte.formats.checkpoint_config import CodesFormat, codes_format

CONFIG, OLD_CONFIG = "config.json", "quantize_config.json"
INDEX = "*.safetensors.index.json"


class QuantisedFolder:
    """Opened, its config understood, nothing of its weights read.

    Attributes:
        path: of the folder.
        format: of the codes.
        config: of the model.
        files: the shards.
    """

    def __init__(self, path: str | Path) -> None:
        """Open it.

        Raises:
            HalfbyteError: no such folder, not a quantised model, a format that cannot be taken over, a shard that is
                missing or corrupt.
        """
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise HalfbyteError(
                "no such folder", where=f"--weights_from {path}", expected="a folder with a quantised checkpoint",
                fix="download it first, with hf download",
            )  # fmt: skip
        raw = self._json(CONFIG)
        self.format = self._format(raw)
        try:
            self.config: PretrainedConfig = AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError, KeyError) as error:
            raise HalfbyteError("no readable model config", where=self.path / CONFIG, got=first_line(error)) from error
        self.files = self._shards()
        self._handles: dict[str, safe_open] = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt")
                names: Iterable[str] = handle.keys()
            except FileNotFoundError as error:
                raise HalfbyteError("shard is missing", where=file, fix="download the checkpoint again") from error
            except (SafetensorError, OSError) as error:
                raise HalfbyteError(
                    "shard is truncated or corrupt", where=file, got=first_line(error),
                    fix="download the checkpoint again",
                ) from error  # fmt: skip
            for name in names:
                if name in self._handles:
                    raise HalfbyteError("tensor is there twice", where=f"{file}, {name}", fix="keep one of the files")
                self._handles[name] = handle

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise HalfbyteError("file is missing", where=path, fix="download the checkpoint again") from error
        except ValueError as error:
            raise HalfbyteError("not readable as JSON", where=path, got=first_line(error)) from error

    def _format(self, raw: dict[str, Any]) -> CodesFormat:
        if raw.get("quantization_config"):
            return codes_format(raw["quantization_config"], where=self.path / CONFIG)
        if (self.path / OLD_CONFIG).exists():
            return codes_format(self._json(OLD_CONFIG), where=self.path / OLD_CONFIG)
        raise HalfbyteError(
            "the checkpoint is not quantised", where=self.path, expected="quantization_config in config.json",
            fix="leave --weights_from out, or name a compressed-tensors or GPTQ checkpoint",
        )  # fmt: skip

    def _shards(self) -> list[Path]:
        indices = sorted(self.path.glob(INDEX))
        names = {name for index in indices for name in self._json(index.name).get("weight_map", {}).values()}
        files = sorted(self.path / name for name in names) or sorted(self.path.glob("*.safetensors"))
        if not files:
            raise HalfbyteError("no safetensors files", where=self.path, fix="use a checkpoint in safetensors format")
        return files

    @property
    def name(self) -> str:
        """For plans and reports."""
        return self.path.resolve().name

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._handles)

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def shape(self, name: str) -> list[int]:
        """Of a tensor, without reading it."""
        return list(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self.tensor(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file.

        Raises:
            HalfbyteError: it is not there, or cannot be read.
        """
        if name not in self._handles:
            raise HalfbyteError(
                "tensor is missing", where=f"{self.path}, {name}", fix="download the checkpoint again, or use another"
            )
        try:
            return self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(
                "tensor cannot be read", where=f"{self.path}, {name}", got=first_line(error),
                fix="download the checkpoint again",
            ) from error  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """sha256 of the config and of all that is in the shards, whatever their names."""
        parts = [json.dumps(self._json(CONFIG), sort_keys=True), *(sha256(file) for file in self.files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
