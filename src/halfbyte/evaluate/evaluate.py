"""``halfbyte eval``: one ruler for any model, plan, GGUF file and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.calibration.text import scored_tokens
from halfbyte.core.environment import cores, resolve_device, resolve_dtype
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import sha256
from halfbyte.core.progress import report
from halfbyte.evaluate.quality import (
    LogitsFile,
    Quality,
    evaluation_text,
    live,
    measure,
    model_logits,
    scratch_folder,
    windows_for,
)
from halfbyte.evaluate.worker import Measured, Request, measure_apart
from halfbyte.models.estimate import check_memory, estimate_load
from halfbyte.models.gguf_file import halfbyte_keys
from halfbyte.models.loading import SourceModel, find, load, made_with
from halfbyte.models.modules import vocabulary
from halfbyte.options import DEFAULT_MODEL, EvalOptions
from halfbyte.plan import Plan, codes_path, load_codes, load_plan
from halfbyte.prepare.simulation import become_simulation_, become_types_, check_same_model, load_types, plan_bits
from halfbyte.quant.quant_linear import set_activation_bits_


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and what made it.

    Attributes:
        quality: perplexity, and KL and top-1 against the model (None where that is what was measured).
        model, fingerprint: the reference.
        evaluated: the plan, the GGUF file, or the model itself.
        engine: what ran it.
        plan: hash of the plan; None without one.
        gguf_sha256: digest of the file; None without one.
        text, ctx, windows: what was scored.
        versions: packages, device and number format.
        cores: CPU cores of this machine that could be used.
        tokenizers_agree: llama.cpp splits the text as the tokenizer does; None where it was not asked.
    """

    quality: Quality
    model: str
    fingerprint: str
    evaluated: str
    engine: str
    plan: str | None
    gguf_sha256: str | None
    text: str
    ctx: int
    windows: int
    versions: dict[str, str]
    cores: int
    tokenizers_agree: bool | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the numbers on the same level as the rest."""
        values = asdict(self)
        return {**values.pop("quality"), **values}


@dataclass(frozen=True)
class _Scored:
    """What one way of evaluating gives."""

    quality: Quality
    windows: int
    engine: str
    tokenizers_agree: bool | None = None


def evaluate(options: EvalOptions) -> Evaluation:
    """Perplexity of a plan, a GGUF file or the model itself, and its KL and top-1 against the model.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    if options.config and options.gguf:
        raise HalfbyteError("--config, --gguf: one at a time, expected a plan or a GGUF file, not both")
    if options.gguf and not Path(options.gguf).is_file():
        raise HalfbyteError(f"{options.gguf}: no such file, expected a GGUF file")
    plan = load_plan(options.config) if options.config else None
    keys = halfbyte_keys(options.gguf) if options.gguf else {}
    searched = plan.text.get("search") if plan else keys.get("plan.text_search")
    text_name, text = evaluation_text(options.text, searched)
    model_id = options.model_id or (plan.model_id if plan else DEFAULT_MODEL)
    with scratch_folder() as name:
        folder = Path(name)
        file = _in_llamacpp(options, folder, text_name, text) if options.gguf else None  # before torch takes memory
        report("load model", 0, 1, model_id)
        source = _load(model_id, options)
        report("load model", 1, 1, model_id)
        if file is not None:
            scored = _score_file(options, source, file, text_name, text)
        else:
            scored = _score_model_(options, source, plan, folder, text_name, text)
    return Evaluation(
        quality=scored.quality,
        model=model_id,
        fingerprint=source.fingerprint,
        evaluated=options.config or options.gguf or model_id,
        engine=scored.engine,
        plan=plan.hash if plan else None,
        gguf_sha256=sha256(options.gguf) if options.gguf else None,
        text=text_name,
        ctx=options.ctx,
        windows=scored.windows,
        versions=made_with(source),
        cores=cores(),
        tokenizers_agree=scored.tokenizers_agree,
    )


def _in_llamacpp(options: EvalOptions, folder: Path, text_name: str, text: str) -> Measured:
    text_file = folder / "text.txt"
    text_file.write_text(text, encoding="utf-8")
    request = Request(
        path=str(options.gguf),
        stage="llama.cpp",
        text_file=str(text_file),
        text_name=text_name,
        logits_file=str(folder / "gguf.logits"),
        ctx=options.ctx,
        chunks=options.chunks,
        engine=options.engine,
        threads=options.threads,
    )
    return measure_apart(request)


def _score_file(options: EvalOptions, source: SourceModel, file: Measured, text_name: str, text: str) -> _Scored:
    """llama.cpp's answers against the model's, on llama.cpp's tokens."""
    vocab = vocabulary(source.model, source.family)
    if file.vocab != vocab:
        raise HalfbyteError(
            f"{options.gguf}: the file is of another model, expected {vocab}, got {file.vocab} tokens in its "
            "vocabulary",
            fix="pass its original with --model_id",
        )
    ours = LogitsFile(Path(file.logits_file), vocab, scored_tokens(options.ctx))
    quality = measure(file.windows, iter(ours), live(file.windows, model_logits(source.model), "reference"))
    agree = file.windows == windows_for(source, text, options.ctx, options.chunks, where=text_name)
    return _Scored(quality, len(file.windows), file.engine, agree)


def _score_model_(
    options: EvalOptions, source: SourceModel, plan: Plan | None, folder: Path, text_name: str, text: str
) -> _Scored:
    """The model against the text, or the simulation that it becomes against the model."""
    if plan is not None:
        check_same_model(source, plan)
    logits_of = model_logits(source.model)
    windows = windows_for(source, text, options.ctx, options.chunks, where=text_name)
    if plan is None:
        return _Scored(measure(windows, live(windows, logits_of, "reference")), len(windows), "transformers")
    kept = LogitsFile(folder / "reference", vocabulary(source.model, source.family), scored_tokens(options.ctx))
    kept.write(windows, logits_of, "reference")
    _become_(source, plan, str(options.config))
    quality = measure(windows, live(windows, logits_of, "plan"), iter(kept))
    return _Scored(quality, len(windows), "transformers (simulation)")


def _load(model_id: str, options: EvalOptions) -> SourceModel:
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    origin = find(model_id, trust_remote_code=options.trust_remote_code)
    check_memory(estimate_load(origin.config, origin.family, dtype, with_codes=options.config is not None), device)
    return load(origin, device=device, dtype=dtype)


def _become_(source: SourceModel, plan: Plan, config: str) -> None:
    if not plan.layers:
        become_types_(source, plan.tensors, load_types(config))
        return
    become_simulation_(source, load_codes(codes_path(config)), plan.layers)
    set_activation_bits_(source.model, plan_bits(plan))
