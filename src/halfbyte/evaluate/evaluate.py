"""``halfbyte eval``: one ruler for any model, plan, GGUF file and text."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from halfbyte.calibration.windows import first_scored
from halfbyte.core.device import made_with, resolve_device, resolve_dtype
from halfbyte.core.environment import cores
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import sha256
from halfbyte.core.progress import report
from halfbyte.evaluate.quality import LogitsFile, live, measure, model_logits, scratch_folder, windows_for
from halfbyte.evaluate.simulation import (
    become_simulation_,
    become_types_,
    check_same_model,
    evaluation_text,
    load_types,
    plan_bits,
)
from halfbyte.evaluate.worker import run_worker
from halfbyte.models.estimate import check_memory, estimate_load
from halfbyte.models.gguf_file import halfbyte_keys
from halfbyte.models.loading import SourceModel, find, load
from halfbyte.models.modules import vocabulary
from halfbyte.options import DEFAULT_MODEL, EvalOptions
from halfbyte.plan import Plan, codes_path, load_codes, load_plan
from halfbyte.quant.quant_linear import set_activation_bits_


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """Perplexity of a plan, a GGUF file or the model itself, and its KL and top-1 against the model.

    Returns:
        ``ppl, ppl_reference, kld_mean, kld_p99, kld_error, top1_agreement, tokens`` (None where there is nothing to
        compare with), and what made them; ``tokenizers_agree``: llama.cpp splits the text as the tokenizer does.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    if options.config and options.gguf:
        raise HalfbyteError("one at a time", where="--config, --gguf", expected="a plan or a GGUF file, not both")
    if options.gguf and not Path(options.gguf).is_file():
        raise HalfbyteError("no such file", where=options.gguf, expected="a GGUF file")
    plan = load_plan(options.config) if options.config else None
    keys = halfbyte_keys(options.gguf) if options.gguf else {}
    searched = plan.text.get("search") if plan else keys.get("plan.text_search")
    text_name, text = evaluation_text(options.text, searched)
    options = replace(options, model_id=options.model_id or (plan.model_id if plan else DEFAULT_MODEL))
    with scratch_folder() as name:
        folder = Path(name)
        result = _in_llamacpp(options, folder, text_name, text) if options.gguf else None
        report("load model", 0, 1, options.model_id)
        source = _load(options)
        report("load model", 1, 1, options.model_id)
        if plan is not None:
            check_same_model(source, plan)
        agree = None
        logits_of = model_logits(source.model)
        size = options.ctx - first_scored(options.ctx) - 1
        if result is not None:
            windows = result["windows"]
            if result["vocab"] != vocabulary(source.model, source.family):
                raise HalfbyteError(
                    "the file is of another model",
                    where=options.gguf,
                    got=f"{result['vocab']} tokens in its vocabulary",
                    expected=vocabulary(source.model, source.family),
                    fix="pass its original with --model_id",
                )
            agree = windows == windows_for(source, text, options.ctx, options.chunks, where=text_name)
            ours = iter(LogitsFile(Path(result["logits_file"]), result["vocab"], size))
            quality = measure(windows, ours, live(windows, logits_of, "reference"))
        else:
            windows = windows_for(source, text, options.ctx, options.chunks, where=text_name)
            if plan is None:
                quality = measure(windows, live(windows, logits_of, "reference"))
            else:
                kept = LogitsFile(folder / "reference", vocabulary(source.model, source.family), size)
                kept.write(windows, logits_of, "reference")
                _become_(source, plan, options)
                quality = measure(windows, live(windows, logits_of, "plan"), iter(kept))
    made_by = _made_by(options, source, plan, text_name, len(windows), result)
    return {**asdict(quality), **made_by, "tokenizers_agree": agree}


def _in_llamacpp(options: EvalOptions, folder: Path, text_name: str, text: str) -> dict[str, Any]:
    text_file = folder / "text.txt"
    text_file.write_text(text, encoding="utf-8")
    request = {
        "path": options.gguf,
        "engine": options.engine,
        "threads": options.threads,
        "ctx": options.ctx,
        "chunks": options.chunks,
        "text_file": str(text_file),
        "text_name": text_name,
        "logits_file": str(folder / "gguf.logits"),
        "prompt": "",
        "max_tokens": 0,
        "stage": "llama.cpp",
    }
    return {**run_worker("halfbyte.evaluate.measure_gguf", request), "logits_file": request["logits_file"]}


def _load(options: EvalOptions) -> SourceModel:
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    assert options.model_id is not None
    origin = find(options.model_id, trust_remote_code=options.trust_remote_code)
    check_memory(estimate_load(origin.config, origin.family, dtype, with_codes=options.config is not None), device)
    return load(origin, device=device, dtype=dtype)


def _become_(source: SourceModel, plan: Plan, options: EvalOptions) -> None:
    assert options.config is not None
    if not plan.layers:
        become_types_(source, plan.tensors, load_types(options.config))
        return
    become_simulation_(source, load_codes(codes_path(options.config)), plan.layers, plan.transforms)
    set_activation_bits_(source.model, plan_bits(plan))


def _made_by(
    options: EvalOptions,
    source: SourceModel,
    plan: Plan | None,
    text_name: str,
    windows: int,
    result: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "model": options.model_id,
        "fingerprint": source.fingerprint,
        "evaluated": options.config or options.gguf or options.model_id,
        "engine": result["engine"] if result else "transformers (simulation)" if plan else "transformers",
        "plan": plan.hash if plan else None,
        "gguf_sha256": sha256(options.gguf) if options.gguf else None,
        "text": text_name,
        "ctx": options.ctx,
        "windows": windows,
        "versions": made_with(source),
        "cores": cores(),
    }
