"""Importance measured block by block is that of whole forward passes, and llama.cpp's quantisers take it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.calibration.imatrix import matrices, measure_importance
from halfbyte.calibration.imatrix_file import check_for, read_imatrix, write_imatrix
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import sha256
from halfbyte.core.progress import listening
from halfbyte.engines import open_engine
from halfbyte.models.gguf_file import open_gguf
from halfbyte.models.loading import SourceModel
from halfbyte.targets.gguf_files.writer import write_gguf
from tests.tiny_models import FAMILIES, some_ids


def by_hooks(source: SourceModel, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean squared input of every nn.Linear in whole forward passes, by GGUF name."""
    seen: dict[str, list[torch.Tensor]] = {}
    tied = source.config.tie_word_embeddings
    handles = []
    for name, module in source.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            known = "model.embed_tokens" if name == "lm_head" and tied else name
            kept = seen.setdefault(source.family.gguf_name(f"{known}.weight"), [])
            keep = lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2))  # noqa: E731
            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for window in tokens:
            source.model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().square().mean(dim=0).numpy() for name, parts in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_whole_forward_passes(tiny, family, batch):
    source, told = tiny(family), []
    tokens = some_ids(source, 4 * 32).view(4, 32)
    with listening(told.append):
        found = measure_importance(source, tokens, device=source.device, batch=batch, text="random")
    expected = by_hooks(source, tokens)
    assert set(found.values) == set(expected) == set(matrices(source))
    assert ("token_embd.weight" in expected) == ("output.weight" not in expected) == source.config.tie_word_embeddings
    for name, value in expected.items():
        assert found.values[name].dtype == np.float32
        np.testing.assert_allclose(found.values[name], value, rtol=1e-4, err_msg=name)
    assert (found.tokens, found.chunk_size, found.chunk_count, found.texts) == (128, 32, 4, ("random",))
    check_for(found, matrices(source))
    assert [(progress.done, progress.total) for progress in told] == [(1, 3), (2, 3), (3, 3)]


def test_overflow_is_named(tiny):
    source = tiny("qwen2", tie_word_embeddings=False)
    with torch.no_grad():
        source.model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(1e30)
    with pytest.raises(HalfbyteError, match=r"blk\.1\.ffn_down\.weight: importance is not finite"):
        measure_importance(source, some_ids(source, 64).view(2, 32), device=source.device)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_llamacpp_quantises_with_it(tiny, tmp_path, family):
    """Every matrix of the file finds its importance, and the file on disk gives the same bytes as the mapping."""
    source, engine = tiny(family), open_engine()
    tokens = some_ids(source, 4 * 32).view(4, 32)
    importance = measure_importance(source, tokens, device=source.device)
    write_imatrix(tmp_path / "imatrix.gguf", importance)
    write_gguf(tmp_path / "f16.gguf", source, embedding_type="F16", output_type="F16")
    quantised = {tensor.name for tensor in open_gguf(tmp_path / "f16.gguf").tensors if len(tensor.shape) == 2}
    assert set(importance.values) == quantised - ({"token_embd.weight"} if "output.weight" in quantised else set())
    ways = {"file": tmp_path / "imatrix.gguf", "mapping": importance.values, "none": None}
    digests = {}
    for way, imatrix in ways.items():
        outcomes = engine.quantize(tmp_path / "f16.gguf", tmp_path / way, "Q4_0", imatrix=imatrix)
        assert not [outcome for outcome in outcomes if "importance" in outcome.note]
        digests[way] = sha256(tmp_path / way)
    assert digests["file"] == digests["mapping"] != digests["none"]
    check_for(read_imatrix(tmp_path / "imatrix.gguf"), matrices(source))
    with engine.load(tmp_path / "file", n_ctx=32) as model:
        assert np.isfinite(model.logits(tokens[0].tolist())).all()
