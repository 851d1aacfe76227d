"""``halfbyte simulate``: a plan in PyTorch, beside the original, all A8 and all A4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.calibration.text import scored_tokens, text_files
from halfbyte.core.files import scratch_folder
from halfbyte.core.guard import Touched, guarded, model_files
from halfbyte.core.progress import report
from halfbyte.evaluate.quality import (
    LogitsFile,
    Quality,
    evaluation_text,
    live,
    measure,
    model_logits,
    sample_text,
    windows_of,
)
from halfbyte.models.loading import SourceModel, made_with
from halfbyte.models.modules import vocabulary
from halfbyte.options import SimulateOptions
from halfbyte.plan import Plan, codes_path, load_codes, load_plan, plan_files
from halfbyte.prepare.simulation import (
    become_simulation_,
    become_types_,
    load_for_plan,
    load_types,
    plan_bits,
    round_inputs_,
)
from halfbyte.quant.quant_linear import set_activation_bits_


@dataclass(frozen=True)
class SimulationRow:
    """One line of the simulation table.

    Attributes:
        name: ``original``, ``GGUF types``, ``all A8``, ``all A4`` or ``plan``.
        mean_bits: mean activation bits, weighted by multiply-accumulates; None where activations are left alone.
        sample: the answer to the prompt.
    """

    name: str
    quality: Quality
    mean_bits: float | None
    sample: str


@dataclass(frozen=True)
class SimulationResult:
    """What ``halfbyte simulate`` shows.

    Attributes:
        plan: what was simulated.
        text: name of the text that was scored.
        versions: packages, device and number format.
    """

    rows: list[SimulationRow]
    plan: Plan
    text: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plan = self.plan
        made_by = {"plan": plan.hash, "model": plan.model_id, "text": self.text, "seed": plan.seed, **self.versions}
        return {"made_by": made_by, "rows": [asdict(row) for row in self.rows]}


def simulate(options: SimulateOptions) -> SimulationResult:
    """Original, weights of the GGUF file, all A8, all A4 and the plan, on text the search has not seen.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    plan = load_plan(options.config)
    model = model_files(options.model_id or plan.model_id)
    inputs = [*plan_files(options.config), *model, *text_files(options.text)]
    with guarded(Touched(inputs=inputs), json=options.json, force=options.force):
        return _simulated(options, plan)


def _simulated(options: SimulateOptions, plan: Plan) -> SimulationResult:
    text_name, texts = evaluation_text(options.text, plan.text.get("search"))
    report("load model", 0, 1, options.model_id or plan.model_id)
    source = load_for_plan(
        plan, options.model_id, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    windows, names = windows_of(source.tokenizer, texts, options.ctx, options.chunks, where=text_name)
    report("load model", 1, 1, f"text {text_name}, {len(windows)} windows of {options.ctx}")
    with scratch_folder() as folder:
        rows = list(_rows(options, plan, source, windows, names, folder))
    return SimulationResult(rows, plan, text_name, made_with(source))


def _rows(
    options: SimulateOptions,
    plan: Plan,
    source: SourceModel,
    windows: list[list[int]],
    names: list[str],  # of the text of each window
    folder: Path,
) -> Iterator[SimulationRow]:
    """Each row is measured when it is asked for, while the model is what the row is about."""
    logits_of = model_logits(source.model)
    vocab = vocabulary(source.model, source.family)
    kept = LogitsFile(folder / "reference", vocab, scored_tokens(options.ctx))

    def row(name: str, mean_bits: float | None) -> SimulationRow:
        quality = measure(windows, live(windows, logits_of, name), iter(kept), names)
        return SimulationRow(name, quality, mean_bits, sample_text(source, options.prompt, options.max_tokens))

    kept.write(windows, logits_of, "original")
    original = measure(windows, iter(kept))
    yield SimulationRow("original", original, None, sample_text(source, options.prompt, options.max_tokens))
    if plan.tensors:
        with _types_loaded_(source, plan, options.config):
            yield row("GGUF types", None)
    if plan.layers:
        become_simulation_(source, load_codes(codes_path(options.config)), plan.layers)
        for name, bits, mean_bits in (
            ("all A8", dict.fromkeys(plan.layers, 8), 8.0),
            ("all A4", dict.fromkeys(plan.layers, 4), 4.0),
            ("plan", plan_bits(plan), 8 * plan.budget_reached),
        ):
            set_activation_bits_(source.model, bits)
            yield row(name, mean_bits)


@contextmanager
def _types_loaded_(source: SourceModel, plan: Plan, config: str) -> Iterator[None]:
    """The model with the weights of the GGUF file, and inputs rounded; afterwards its own again."""
    own = dict(source.model.named_parameters(remove_duplicate=False))
    become_types_(source, plan.tensors, load_types(config))
    rounding = round_inputs_(source, plan.tensors)
    try:
        yield
    finally:
        for hook in rounding:
            hook.handle.remove()
        for name, parameter in own.items():
            module, _, leaf = name.rpartition(".")
            setattr(source.model.get_submodule(module), leaf, parameter)
