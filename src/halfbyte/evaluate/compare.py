"""Original, Q4_K_M and mixed, measured one after the other, each in a process of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.windows import first_scored
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.naming import download_command, f16_gguf, mixed_gguf, q4km_gguf
from halfbyte.core.progress import report
from halfbyte.engines import open_engine
from halfbyte.evaluate.quality import LogitsFile, Quality, measure, scratch_folder
from halfbyte.evaluate.worker import run_worker
from halfbyte.models.gguf_file import halfbyte_keys
from halfbyte.options import CompareOptions


@dataclass(frozen=True)
class CompareRow:
    """One line of the comparison; ``missing`` says why there are no numbers.

    Attributes:
        engine: what ran it.
        path: the file, or the model id.
        measured: bytes, load_seconds, prompt_tokens_per_second, generation_tokens_per_second, peak_memory, sample.
        speed_up: generation speed over the F16 original in llama.cpp.
        note: what the reader has to know beside the numbers.
        quality: against the F16 original in llama.cpp, where that was run.
    """

    name: str
    path: str
    engine: str = ""
    measured: dict[str, Any] | None = None
    quality: Quality | None = None
    speed_up: float | None = None
    missing: str = ""
    note: str = ""


class Comparison:
    """Runs the rows; keeps the reference's logits in a scratch folder between them."""

    def __init__(
        self,
        options: CompareOptions,
        model_id: str,
        text: tuple[str, str],
        plan_hash: str | None,
        folder: Path,
    ) -> None:
        self.options, self.model_id, self.folder = options, model_id, folder
        self.plan_hash = plan_hash
        self.text_name = text[0]
        self.text_file = folder / "text.txt"
        self.text_file.write_text(text[1], encoding="utf-8")
        self.reference: dict[str, Any] | None = None

    def rows(self) -> Iterator[CompareRow]:
        """Measure and yield each row; one that fails is yielded as missing, and the others go on."""
        f16 = f16_gguf(self.model_id)
        made_q4km = ""
        if not self.options.skip_original:
            original = self._original(f16)
            f16_row = self._f16(f16, original.measured)
            yield self._compared(original)
            yield self._with_speed_up(f16_row)
            if f16_row.measured:
                made_q4km = self._make_q4km(f16)
        row = self._compared(self._gguf("Q4_K_M", self._q4km, f"get it with: {download_command(self.model_id)}"))
        yield replace(row, note=made_q4km)
        mixed = Path(self.options.mixed_path or mixed_gguf(self.model_id))
        how_to_make = f"make it with: python export_gguf_official.py --output {mixed}"
        row = self._compared(self._gguf("mixed", mixed, how_to_make))
        yield replace(row, note=self._other_plan(mixed) if row.measured else "")

    def _f16(self, path: Path, original: dict[str, Any] | None) -> CompareRow:
        """The original in llama.cpp, from a file that was made from this very model."""
        name = "original, F16 GGUF"
        if original is None:
            return CompareRow(name, str(path), missing="the original could not be measured")
        try:
            made_from = halfbyte_keys(path).get("fingerprint")
        except HalfbyteError as error:
            return CompareRow(name, str(path), missing=f"{error}; move it away")
        if made_from != original["fingerprint"]:
            return CompareRow(name, str(path), missing=f"{path} was not made from this model; move it away")
        row = self._gguf(name, path, "")
        if row.measured is None:
            return row
        self.reference = row.measured
        quality = measure(row.measured["windows"], iter(self._logits(row.measured)))
        return replace(row, quality=quality, note=f"kept as {path} for the next comparison")

    def _other_plan(self, path: Path) -> str:
        """Says so if the mixed file does not hold the plan at hand."""
        there = halfbyte_keys(path).get("plan.hash")
        if self.plan_hash is None or there == self.plan_hash:
            return ""
        return f"this file holds plan {there or 'unknown'}, not the plan at hand ({self.plan_hash}): export it again"

    @property
    def _q4km(self) -> Path:
        return Path(self.options.q4km_path or q4km_gguf(self.model_id))

    def _make_q4km(self, f16: Path) -> str:
        """Quantise the original with llama.cpp's recipe if the file is not there; says what was done."""
        if self._q4km.exists():
            return ""
        report("Q4_K_M", 0, 1, "quantise with llama.cpp's recipe")
        try:
            outcomes = open_engine(self.options.engine).quantize(f16, self._q4km, "Q4_K_M")
        except HalfbyteError as error:
            return f"could not be made: {error}"
        report("Q4_K_M", 1, 1, "quantised with llama.cpp's recipe")
        fallen = Counter(f"{outcome.asked} to {outcome.done}" for outcome in outcomes)
        notes = [f"{count} tensors fell back from {kinds}" for kinds, count in fallen.items()]
        return ", ".join([f"made with llama.cpp's recipe as {self._q4km}", *notes])

    def _request(self, name: str, path: str) -> dict[str, Any]:
        options = self.options
        return {
            "path": path,
            "engine": options.engine,
            "threads": options.threads,
            "ctx": options.ctx,
            "chunks": options.chunks,
            "text_file": str(self.text_file),
            "text_name": self.text_name,
            "logits_file": str(self.folder / f"{name.replace(' ', '-')}.logits"),
            "prompt": options.prompt,
            "max_tokens": options.max_tokens,
            "stage": name,
        }

    def _original(self, f16: Path) -> CompareRow:
        name = "original"
        request = {
            **self._request(name, self.model_id),
            "device": self.options.device,
            "dtype": self.options.dtype,
            "trust_remote_code": self.options.trust_remote_code,
            "f16_path": str(f16),
        }
        try:
            result = run_worker("halfbyte.evaluate.measure_original", request)
        except HalfbyteError as error:
            return CompareRow(name, self.model_id, missing=str(error))
        result["logits_file"] = request["logits_file"]
        return CompareRow(name, self.model_id, result["engine"], result)

    def _gguf(self, name: str, path: Path, how_to_get: str) -> CompareRow:
        if not path.exists():
            return CompareRow(name, str(path), missing=f"no file {path}; {how_to_get}")
        request = self._request(name, str(path))
        try:
            result = run_worker("halfbyte.evaluate.measure_gguf", request)
        except HalfbyteError as error:
            return CompareRow(name, str(path), missing=str(error))
        result["logits_file"] = request["logits_file"]
        return CompareRow(name, str(path), result["engine"], result)

    def _compared(self, row: CompareRow) -> CompareRow:
        """A measured row with its quality and speed against the reference."""
        return self._with_speed_up(self._with_quality(row, row.measured)) if row.measured else row

    def _with_quality(self, row: CompareRow, result: dict[str, Any]) -> CompareRow:
        reference = self.reference
        if reference is not None and reference["windows"] != result["windows"]:
            return replace(row, measured=None, missing="its tokenizer splits the text in another way")
        try:
            quality = measure(
                result["windows"], iter(self._logits(result)), iter(self._logits(reference)) if reference else None
            )
        except HalfbyteError as error:
            return replace(row, measured=None, missing=str(error))
        finally:
            Path(result["logits_file"]).unlink()
        return replace(row, quality=quality)

    def _logits(self, result: dict[str, Any]) -> LogitsFile:
        ctx = self.options.ctx
        return LogitsFile(Path(result["logits_file"]), result["vocab"], ctx - first_scored(ctx) - 1)

    def _with_speed_up(self, row: CompareRow) -> CompareRow:
        speed = (row.measured or {}).get("generation_tokens_per_second")
        base = (self.reference or {}).get("generation_tokens_per_second")
        if not speed or not base:
            return row
        return replace(row, speed_up=speed / base)


def compare(options: CompareOptions, model_id: str, text: tuple[str, str], plan_hash: str | None) -> list[CompareRow]:
    """All rows of the comparison.

    Args:
        model_id: the original.
        text: (name, text) to evaluate on.
        plan_hash: of the plan at hand, which the mixed file should hold.

    Raises:
        HalfbyteError: nothing could be measured.
    """
    for flag in ("ctx", "chunks", "max_tokens"):
        if getattr(options, flag) < 1:
            raise HalfbyteError("must be positive", where=f"--{flag}", got=getattr(options, flag))
    with scratch_folder() as folder, torch.no_grad():
        rows = list(Comparison(options, model_id, text, plan_hash, Path(folder)).rows())
    if all(row.missing for row in rows):
        raise HalfbyteError("nothing to compare: " + "; ".join(f"{row.name}: {row.missing}" for row in rows))
    return rows
