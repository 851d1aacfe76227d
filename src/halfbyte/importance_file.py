"""Measure an importance matrix and write it as llama.cpp's tools read it; and take theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from halfbyte.calibration.importance import matrices, measure_importance
from halfbyte.calibration.text import load_text
from halfbyte.calibration.windows import cut
from halfbyte.files import check_output
from halfbyte.formats.imatrix import Importance, check_for, read_imatrix, write_imatrix
from halfbyte.models.device import resolve_device, resolve_dtype
from halfbyte.models.loading import SourceModel, find, load
from halfbyte.options import ImatrixOptions
from halfbyte.progress import Reporter, silent

BATCH_TOKENS = 4096  # that go through a block at once on an accelerator


def make_imatrix(options: ImatrixOptions, report: Reporter = silent) -> Importance:
    """Measure and write it.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    path = check_output(options.output, force=options.force)
    device = resolve_device(options.device)
    origin = find(options.model_id, trust_remote_code=options.trust_remote_code)
    source = load(origin, device=torch.device("cpu"), dtype=resolve_dtype(options.dtype, device))
    text = load_text(options.calib)
    ids = source.tokenizer(text.parts["calib"], add_special_tokens=False).input_ids
    count = max(1, options.calib_tokens // options.ctx)
    tokens = torch.tensor(cut(ids, options.ctx, count, spread=True, where=f"{text.name} (calib part)"))
    batch = 1 if device.type == "cpu" else max(1, BATCH_TOKENS // options.ctx)
    made = measure_importance(source, tokens, device=device, batch=batch, text=text.name, report=report)
    write_imatrix(path, made)
    return made


def importance_for(source: SourceModel, path: str | Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Importance of the matrices ``names`` (module paths) from a file, fp32 ``[in]``; the head only if it is there.

    Raises:
        HalfbyteError: the file cannot be read, or is of another model.
    """
    given, family = read_imatrix(path), source.family
    top = {family.gguf_name(f"{part}.weight") for part in (family.embedding, family.head)}
    check_for(given, {name: width for name, width in matrices(source).items() if name not in top}, where=path)
    found = {name: given.values.get(family.gguf_name(f"{name}.weight")) for name in names}
    return {name: torch.from_numpy(value) for name, value in found.items() if value is not None}
