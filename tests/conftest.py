"""Tiny models as fixtures: saved as Hugging Face folders, and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from halfbyte.models.loading import SourceModel, find, load
from tests.tiny_models import MODELS, SIZE, hf_byte_level, hf_sentencepiece, randomise_


@pytest.fixture(scope="session")
def tokenizers_by_style() -> Callable[[str], PreTrainedTokenizerFast]:
    made: dict[str, PreTrainedTokenizerFast] = {}

    def get(style: str) -> PreTrainedTokenizerFast:
        if style not in made:
            made[style] = hf_sentencepiece() if style == "sentencepiece" else hf_byte_level(style)
        return made[style]

    return get


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizers_by_style) -> Callable[..., Path]:
    """A saved model of one of ``FAMILIES``; further arguments change its config."""

    def save(family: str, tokenizer: str | None = None, seed_of_weights: int = 0, **changes: Any) -> Path:
        config_class, model_class, style, settings = MODELS[family]
        wrapped = tokenizers_by_style(tokenizer or style)
        ids = {f"{kind}_token_id": getattr(wrapped, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        vocab_size = len(wrapped) + 24  # some ids without a token, as in Qwen2
        model = model_class(config_class(**{**SIZE, **settings, **ids, "vocab_size": vocab_size, **changes}))
        randomise_(model, seed_of_weights)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        wrapped.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> Callable[..., SourceModel]:
    """The same, loaded; the plain ones once per session."""
    loaded: dict[str, SourceModel] = {}

    def get(family: str, **changes: Any) -> SourceModel:
        if changes or family not in loaded:
            source = load(find(str(tiny_folder(family, **changes))), device=torch.device("cpu"), dtype=torch.float32)
            if changes:
                return source
            loaded[family] = source
        return loaded[family]

    return get


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Converted tokenizers of throw-away files do not belong in the user's cache."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path_factory.mktemp("cache")))
