"""``halfbyte eval``: one ruler for any model, plan, GGUF file, served folder and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.calibration.text import scored_tokens, text_files
from halfbyte.core.environment import cores, resolve_device, resolve_dtype
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import scratch_folder, sha256
from halfbyte.core.guard import Touched, guarded, model_files
from halfbyte.core.progress import report
from halfbyte.evaluate.measure_served import (
    FolderRecord,
    ServedRequest,
    check_folder,
    check_same_shape,
    measure_served,
    record_of,
    serve_python,
)
from halfbyte.evaluate.quality import (
    LogitsFile,
    Quality,
    evaluation_text,
    live,
    measure,
    model_logits,
    windows_of,
)
from halfbyte.evaluate.worker import Measured, Request, measure_apart, written_texts
from halfbyte.models.estimate import check_memory, estimate_load
from halfbyte.models.gguf_file import halfbyte_keys
from halfbyte.models.loading import SourceModel, find, load, load_tokenizer, made_with
from halfbyte.models.modules import vocabulary
from halfbyte.options import DEFAULT_MODEL, EvalOptions
from halfbyte.plan import Plan, codes_path, load_codes, load_plan, plan_files
from halfbyte.prepare.simulation import (
    become_simulation_,
    become_types_,
    check_same_model,
    load_types,
    plan_bits,
    round_inputs_,
)
from halfbyte.quant.quant_linear import set_activation_bits_


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and what made it.

    Attributes:
        quality: perplexity, and KL and top-1 against the model (None where that is what was measured).
        model, fingerprint: the reference.
        evaluated: the plan, the GGUF file, the folder, or the model itself.
        engine: what ran it.
        plan: hash of the plan; None without one.
        gguf_sha256: digest of the file; None without one.
        text, ctx, windows: what was scored.
        versions: packages, device and number format.
        cores: CPU cores of this machine that could be used.
        tokenizers_agree: llama.cpp splits the text as the tokenizer does; None where it was not asked.
        kernels: what vLLM said about the kernels that it chose.
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
    kernels: tuple[str, ...] = ()

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
    kernels: tuple[str, ...] = ()


def evaluate(options: EvalOptions) -> Evaluation:
    """Perplexity of a plan, a GGUF file, a served folder or the model itself, and its KL and top-1 against the model.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    _check(options)
    plan = load_plan(options.config) if options.config else None
    model_id = options.model_id or (plan.model_id if plan else DEFAULT_MODEL)
    inputs = [*model_files(model_id), *(plan_files(options.config) if options.config else ())]
    inputs += [path for path in (options.gguf, options.served) if path]
    touched = Touched(inputs=[*inputs, *text_files(options.text)])
    with guarded(touched, json=options.json, force=options.force):
        return _evaluated(options, plan, model_id)


def _evaluated(options: EvalOptions, plan: Plan | None, model_id: str) -> Evaluation:
    known = _known(options, plan)
    text_name, texts = evaluation_text(options.text, known.text_search)
    with scratch_folder() as folder:
        elsewhere: Measured | None = None  # another engine comes before torch takes memory
        if options.gguf:
            elsewhere = _in_llamacpp(options, folder, text_name, texts)
        elif options.served:
            elsewhere = _in_vllm(options, options.served, model_id, folder, text_name, texts)
        report("load model", 0, 1, model_id)
        source = _load(model_id, options)
        report("load model", 1, 1, model_id)
        if elsewhere is not None:
            scored = _score_elsewhere(options, source, elsewhere, text_name, texts)
        else:
            scored = _score_model_(options, source, plan, folder, text_name, texts)
    return Evaluation(
        quality=scored.quality,
        model=model_id,
        fingerprint=source.fingerprint,
        evaluated=options.config or options.gguf or options.served or model_id,
        engine=scored.engine,
        plan=known.plan,
        gguf_sha256=sha256(options.gguf) if options.gguf else None,
        text=text_name,
        ctx=options.ctx,
        windows=scored.windows,
        versions=made_with(source),
        cores=cores(),
        tokenizers_agree=scored.tokenizers_agree,
        kernels=scored.kernels,
    )


def _check(options: EvalOptions) -> None:
    """Refuse, before any work, what cannot be evaluated."""
    if options.gguf and not Path(options.gguf).is_file():
        raise HalfbyteError(f"{options.gguf}: no such file, expected a GGUF file")
    if options.served:
        check_folder(options.served)


@dataclass(frozen=True)
class _Known:
    """What is known of the plan behind what is evaluated: its hash, and the digest of its search text."""

    plan: str | None
    text_search: str | None


def _known(options: EvalOptions, plan: Plan | None) -> _Known:
    if plan is not None:
        return _Known(plan.hash, plan.text.get("search"))
    if options.gguf:
        return _Known(None, halfbyte_keys(options.gguf).get("plan.text_search"))
    record = record_of(options.served) if options.served else FolderRecord()
    return _Known(record.plan, record.text_search)


def _in_llamacpp(options: EvalOptions, folder: Path, text_name: str, texts: dict[str, str]) -> Measured:
    request = Request(
        path=str(options.gguf),
        stage="llama.cpp",
        texts=written_texts(folder, texts),
        text_name=text_name,
        logits_file=str(folder / "gguf.logits"),
        ctx=options.ctx,
        chunks=options.chunks,
        engine=options.engine,
        threads=options.threads,
    )
    return measure_apart(request)


def _in_vllm(
    options: EvalOptions, served: str, model_id: str, folder: Path, text_name: str, texts: dict[str, str]
) -> Measured:
    """vLLM's answers on the tokens of the reference's tokenizer."""
    python = serve_python(options.serve_python, served)
    origin = find(model_id, trust_remote_code=options.trust_remote_code)
    check_same_shape(served, origin.config, model_id)
    tokenizer = load_tokenizer(origin.folder, trust_remote_code=options.trust_remote_code, where=model_id)
    windows, names = windows_of(tokenizer, texts, options.ctx, options.chunks, where=text_name)
    request = ServedRequest(
        folder=served,
        stage="vLLM",
        python=python,
        windows=windows,
        ctx=options.ctx,
        logits_file=str(folder / "served.logits"),
        tensor_parallel=options.tensor_parallel,
        trust_remote_code=options.trust_remote_code,
    )
    return replace(measure_served(request), texts=names)


def _score_elsewhere(
    options: EvalOptions, source: SourceModel, other: Measured, text_name: str, texts: dict[str, str]
) -> _Scored:
    """Another engine's answers against the model's, on that engine's tokens."""
    vocab = vocabulary(source.model, source.family)
    what = options.gguf or options.served
    if other.vocab != vocab:
        raise HalfbyteError(
            f"{what}: it is of another model, expected {vocab}, got {other.vocab} tokens in its vocabulary",
            fix="pass its original with --model_id",
        )
    if options.served and other.fingerprint not in (None, source.fingerprint):
        raise HalfbyteError(
            f"{what}: it was made from another model, expected {source.fingerprint}, got {other.fingerprint}",
            fix="pass its original with --model_id",
        )
    ours = LogitsFile(Path(other.logits_file), vocab, scored_tokens(options.ctx))
    reference = live(other.windows, model_logits(source.model), "reference")
    quality = measure(other.windows, iter(ours), reference, other.texts)
    agree = None
    if options.gguf:
        windows, _ = windows_of(source.tokenizer, texts, options.ctx, options.chunks, where=text_name)
        agree = other.windows == windows
    return _Scored(quality, len(other.windows), other.engine, agree, other.kernels)


def _score_model_(
    options: EvalOptions,
    source: SourceModel,
    plan: Plan | None,
    folder: Path,
    text_name: str,
    texts: dict[str, str],
) -> _Scored:
    """The model against the text, or the simulation that it becomes against the model."""
    if plan is not None:
        check_same_model(source, plan)
    logits_of = model_logits(source.model)
    windows, names = windows_of(source.tokenizer, texts, options.ctx, options.chunks, where=text_name)
    if plan is None:
        return _Scored(measure(windows, live(windows, logits_of, "reference")), len(windows), "transformers")
    kept = LogitsFile(folder / "reference", vocabulary(source.model, source.family), scored_tokens(options.ctx))
    kept.write(windows, logits_of, "reference")
    _become_(source, plan, str(options.config))
    quality = measure(windows, live(windows, logits_of, "plan"), iter(kept), names)
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
        round_inputs_(source, plan.tensors)
        return
    become_simulation_(source, load_codes(codes_path(config)), plan.layers)
    set_activation_bits_(source.model, plan_bits(plan))
