"""Tiny models as fixtures: saved as Hugging Face folders, and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from halfbyte.models.loading import SourceModel, find, load
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import Prepared, prepare_
from halfbyte.quant.int4 import GroupedWeight
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.quant.quantisers import QUANTISERS, WeightQuantiser
from tests.tiny_models import MODELS, SIZE, hf_byte_level, hf_sentencepiece, randomise_

LONGEST = (
    "test_demo.py",
    "test_types.py",
    "test_parallel.py",
    "test_resume.py",
    "test_pipeline.py",
)  # files that start first where several processes share


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: one that starts last would leave the other process waiting."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_configure(config: pytest.Config) -> None:
    """One thread, here and in the processes that tests start: tiny tensors only wait for a second one.

    Each process of ``pytest -n`` gets a core of its own, because threads of llama.cpp that share one wait by spinning.
    """
    worker = getattr(config, "workerinput", {}).get("workerid", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    if worker or "not slow" in config.option.markexpr:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


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
def transformed(monkeypatch) -> Callable[..., Prepared]:
    """Preparation in place without rounding, so that only what transforms do is left."""

    def keep(moments, group_size, *_):
        rows, width = moments.weight.shape
        return GroupedWeight(moments.weight, torch.ones(rows, width // group_size)), ""  # every "code" is the weight

    monkeypatch.setattr(GroupedWeight, "pack", lambda weight: weight)
    monkeypatch.setitem(
        QUANTISERS._registered, "exact", WeightQuantiser(keep, looks_at_inputs=False, rounding_share=1.0)
    )

    def transform(source: SourceModel, tokens: torch.Tensor, names: str, alpha: float | None = None) -> Prepared:
        recipe = Recipe(tuple(names.split(",")), "exact", alpha, clip=False)
        made = prepare_(source, tokens, recipe, device=source.device)
        set_activation_bits_(source.model, dict.fromkeys(made.layers))
        return made

    return transform


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Converted tokenizers of throw-away files do not belong in the user's cache."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path_factory.mktemp("cache")))
