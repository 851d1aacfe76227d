"""Original, Q4_K_M, mixed and folders in vLLM, measured one after the other, each in a process of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from halfbyte.arguments import checked_path
from halfbyte.calibration.text import scored_tokens, text_files
from halfbyte.core.environment import cores, cpu_name
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import download_command, f16_gguf, mixed_gguf, q4km_gguf, scratch_folder
from halfbyte.core.guard import Touched, guarded, model_files
from halfbyte.core.progress import report
from halfbyte.engines import open_engine
from halfbyte.evaluate.measure_served import ServedRequest, check_folder, measure_served, record_of, serve_python
from halfbyte.evaluate.quality import LogitsFile, Quality, evaluation_text, measure, windows_of
from halfbyte.evaluate.worker import Measured, OriginalRequest, Request, measure_apart, written_texts
from halfbyte.models.gguf_file import halfbyte_keys
from halfbyte.models.loading import load_tokenizer
from halfbyte.options import DEFAULT_MODEL, CompareOptions
from halfbyte.plan import Plan, load_plan

PACKAGES = ("halfbyte", "torch", "transformers", "xllamacpp")
ORIGINAL, F16, Q4KM, MIXED = "original", "original, F16 GGUF", "Q4_K_M", "mixed"  # the rows


@dataclass(frozen=True)
class CompareRow:
    """One line of the comparison; ``missing`` says why there are no numbers.

    Attributes:
        path: the file, or the model id.
        engine: what ran it.
        measured: size, speed, memory and the sample text.
        quality: against the F16 original in llama.cpp, where that was run.
        speed_up: generation speed over the F16 original in llama.cpp.
        note: what the reader has to know beside the numbers.
        plan: hash of the plan that it holds; None if it does not say.
    """

    name: str
    path: str
    engine: str = ""
    measured: Measured | None = None
    quality: Quality | None = None
    speed_up: float | None = None
    missing: str = ""
    note: str = ""
    plan: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what only the computation needed."""
        values = asdict(self)
        for key in ("windows", "texts", "logits_file"):
            if values["measured"] is not None:
                del values["measured"][key]
        return values


@dataclass(frozen=True)
class Comparison:
    """The rows, and what made them.

    Attributes:
        model: the original.
        plan: the plan at hand, if there is one.
        text, ctx, chunks: what was scored, in windows of so many tokens, and how many windows.
        prompt: what the sample texts answer.
        against_original: whether the original was run, which KL, top-1 and speed-up are measured against.
        machine: processor and cores.
        versions: package -> version.
    """

    rows: list[CompareRow]
    model: str
    plan: Plan | None
    text: str
    ctx: int
    chunks: int
    prompt: str
    against_original: bool
    machine: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "plan": self.plan.hash if self.plan else None,
            "text": self.text,
            "prompt": self.prompt,
            "ctx": self.ctx,
            "chunks": self.chunks,
            "seed": self.plan.seed if self.plan else None,
            "machine": self.machine,
            "versions": self.versions,
            "rows": [row.to_dict() for row in self.rows],
        }


def compare(options: CompareOptions) -> Comparison:
    """Measure all rows; one that fails is missing, with the reason, and the others go on.

    Raises:
        HalfbyteError: nothing could be measured.
    """
    plan = _plan_at_hand(options)
    model_id = options.model_id or (plan.model_id if plan else DEFAULT_MODEL)
    with guarded(_touched(options, model_id), json=options.json, force=options.force):
        return _compared(options, plan, model_id)


def _touched(options: CompareOptions, model_id: str) -> Touched:
    """What is read, and made where it is missing: the original and its Q4_K_M as files."""
    q4km, mixed = options.q4km_path or q4km_gguf(model_id), options.mixed_path or mixed_gguf(model_id)
    inputs = [
        options.config,
        *model_files(model_id),
        q4km,
        mixed,
        *folders_of(options.served),
        *text_files(options.text),
    ]
    f16 = f16_gguf(model_id)
    made = () if options.skip_original or f16.exists() else (f16,)
    return Touched(inputs=inputs, shared=made)


def _compared(options: CompareOptions, plan: Plan | None, model_id: str) -> Comparison:
    text_name, texts = evaluation_text(options.text, plan.text.get("search") if plan else None)
    with scratch_folder() as folder, torch.no_grad():
        runs = _Runs(options, model_id, text_name, texts, plan.hash if plan else None, folder)
        rows = list(runs.rows())
    if all(row.missing for row in rows):
        raise HalfbyteError("nothing to compare: " + "; ".join(f"{row.name}: {row.missing}" for row in rows))
    return Comparison(
        rows=rows,
        model=model_id,
        plan=plan,
        text=text_name,
        ctx=options.ctx,
        chunks=max(len(row.measured.windows) for row in rows if row.measured),
        prompt=options.prompt,
        against_original=not options.skip_original,
        machine=f"{cpu_name()}, {cores()} cores",
        versions={name: _version(name) for name in PACKAGES},
    )


def folders_of(served: str | None) -> list[str]:
    """The folders that ``--served`` names."""
    return [checked_path(folder, "--served") for folder in (served or "").split(",") if folder.strip()]


def _plan_at_hand(options: CompareOptions) -> Plan | None:
    """The plan, which may be missing only if nobody asked for it."""
    if Path(options.config).exists():
        return load_plan(options.config, with_codes=False)
    if options.config != CompareOptions().config:
        raise HalfbyteError(f"{options.config}: no such plan")
    return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class _Runs:
    """Runs the rows; keeps the reference's logits in a scratch folder between them."""

    def __init__(
        self,
        options: CompareOptions,
        model_id: str,
        text_name: str,
        texts: dict[str, str],
        plan_hash: str | None,
        folder: Path,
    ) -> None:
        self.options, self.model_id, self.text_name, self.plan_hash = options, model_id, text_name, plan_hash
        self.folder, self.texts = folder, texts
        self.text_files = written_texts(folder, texts)
        self.reference: Measured | None = None

    def rows(self) -> Iterator[CompareRow]:
        f16 = f16_gguf(self.model_id)
        made_q4km = ""
        if not self.options.skip_original:
            original = self._original(f16)
            f16_row = self._f16(f16, original.measured)
            yield self._compared(original)
            yield self._with_speed_up(f16_row)
            if f16_row.measured:
                made_q4km = self._make_q4km(f16)
        row = self._compared(self._gguf(Q4KM, self._q4km, f"get it with: {download_command(self.model_id)}"))
        yield replace(row, note=made_q4km)
        mixed = Path(self.options.mixed_path or mixed_gguf(self.model_id))
        how_to_make = f"make it with: python export_gguf_official.py --output {mixed}"
        row = self._compared(self._gguf(MIXED, mixed, how_to_make))
        yield self._with_plan(row, halfbyte_keys(mixed).get("plan.hash")) if row.measured else row
        for folder in folders_of(self.options.served):
            yield self._served(folder)

    def _original(self, f16: Path) -> CompareRow:
        request = OriginalRequest(
            **self._shared(ORIGINAL, self.model_id),
            device=self.options.device,
            dtype=self.options.dtype,
            trust_remote_code=self.options.trust_remote_code,
            f16_path=str(f16),
        )
        return _measured_row(ORIGINAL, request)

    def _f16(self, path: Path, original: Measured | None) -> CompareRow:
        """The original in llama.cpp, from a file that was made from this very model."""
        if original is None:
            return CompareRow(F16, str(path), missing="the original could not be measured")
        try:
            made_from = halfbyte_keys(path).get("fingerprint")
        except HalfbyteError as error:
            return CompareRow(F16, str(path), missing=f"{error}; move it away")
        if made_from != original.fingerprint:
            return CompareRow(F16, str(path), missing=f"{path} was not made from this model; move it away")
        row = self._gguf(F16, path, "")
        if row.measured is None:
            return row
        self.reference = row.measured
        quality = measure(row.measured.windows, iter(self._logits(row.measured)), texts=row.measured.texts)
        return replace(row, quality=quality, note=f"kept as {path} for the next comparison")

    def _gguf(self, name: str, path: Path, how_to_get: str) -> CompareRow:
        if not path.exists():
            return CompareRow(name, str(path), missing=f"no file {path}; {how_to_get}")
        return _measured_row(name, Request(**self._shared(name, str(path))))

    def _served(self, folder: str) -> CompareRow:
        """A folder in vLLM, on the reference's tokens where there is one."""
        name = f"vLLM: {Path(folder).resolve().name}"
        options = self.options
        try:
            check_folder(folder)
            python = serve_python(options.serve_python, folder)
            reference = self.reference
            windows, texts = (reference.windows, reference.texts) if reference else self._windows(folder)
            request = ServedRequest(
                folder=folder,
                stage=name,
                python=python,
                windows=windows,
                ctx=options.ctx,
                logits_file=str(self.folder / "served.logits"),
                tensor_parallel=options.tensor_parallel,
                trust_remote_code=options.trust_remote_code,
                prompt=options.prompt,
                max_tokens=options.max_tokens,
            )
            measured = replace(measure_served(request), texts=texts)
        except HalfbyteError as error:
            return CompareRow(name, folder, missing=str(error))
        row = CompareRow(name, folder, measured.engine, measured, note="; ".join(measured.kernels))
        row = replace(row, plan=record_of(folder).plan)
        return self._with_quality(row, measured)  # no speed-up: over llama.cpp, often on another device

    def _windows(self, folder: str) -> tuple[list[list[int]], list[str]]:
        tokenizer = load_tokenizer(folder, where=folder)
        return windows_of(tokenizer, self.texts, self.options.ctx, self.options.chunks, where=self.text_name)

    def _shared(self, name: str, path: str) -> dict[str, Any]:
        """What all requests have."""
        options = self.options
        return {
            "path": path,
            "stage": name,
            "texts": self.text_files,
            "text_name": self.text_name,
            "logits_file": str(self.folder / f"{name.replace(' ', '-')}.logits"),
            "ctx": options.ctx,
            "chunks": options.chunks,
            "engine": options.engine,
            "threads": options.threads,
            "prompt": options.prompt,
            "max_tokens": options.max_tokens,
        }

    def _with_plan(self, row: CompareRow, plan: str | None) -> CompareRow:
        """The row, and a note if its file does not hold the plan at hand."""
        if self.plan_hash is None or plan == self.plan_hash:
            return replace(row, plan=plan)
        note = f"this file holds plan {plan or 'unknown'}, not the plan at hand ({self.plan_hash}): export it again"
        return replace(row, plan=plan, note=note)

    @property
    def _q4km(self) -> Path:
        return Path(self.options.q4km_path or q4km_gguf(self.model_id))

    def _make_q4km(self, f16: Path) -> str:
        """Quantise the original with llama.cpp's recipe if the file is not there; says what was done."""
        if self._q4km.exists():
            return ""
        report(Q4KM, 0, 1, "quantise with llama.cpp's recipe")
        try:
            outcomes = open_engine(self.options.engine).quantize(f16, self._q4km, "Q4_K_M")
        except HalfbyteError as error:
            return f"could not be made: {error}"
        report(Q4KM, 1, 1, "quantised with llama.cpp's recipe")
        fallen = Counter(f"{outcome.asked} to {outcome.done}" for outcome in outcomes)
        notes = [f"{count} tensors fell back from {kinds}" for kinds, count in fallen.items()]
        return ", ".join([f"made with llama.cpp's recipe as {self._q4km}", *notes])

    def _compared(self, row: CompareRow) -> CompareRow:
        """A measured row with its quality and speed against the reference."""
        return self._with_speed_up(self._with_quality(row, row.measured)) if row.measured else row

    def _with_quality(self, row: CompareRow, measured: Measured) -> CompareRow:
        reference = self.reference
        if reference is not None and reference.windows != measured.windows:
            return replace(row, measured=None, missing="its tokenizer splits the text in another way")
        theirs = iter(self._logits(reference)) if reference else None
        try:
            quality = measure(measured.windows, iter(self._logits(measured)), theirs, measured.texts)
        except HalfbyteError as error:
            return replace(row, measured=None, missing=str(error))
        finally:
            Path(measured.logits_file).unlink()
        return replace(row, quality=quality)

    def _logits(self, measured: Measured) -> LogitsFile:
        ctx = self.options.ctx
        return LogitsFile(Path(measured.logits_file), measured.vocab, scored_tokens(ctx))

    def _with_speed_up(self, row: CompareRow) -> CompareRow:
        speed = row.measured.generation_tokens_per_second if row.measured else None
        base = self.reference.generation_tokens_per_second if self.reference else None
        return replace(row, speed_up=speed / base) if speed and base else row


def _measured_row(name: str, request: Request) -> CompareRow:
    try:
        measured = measure_apart(request)
    except HalfbyteError as error:
        return CompareRow(name, request.path, missing=str(error))
    return CompareRow(name, request.path, measured.engine, measured)
