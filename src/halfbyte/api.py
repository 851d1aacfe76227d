"""The library: what the commands call, for scripts and notebooks.

    import halfbyte

    quantised = halfbyte.quantize("demo", target="gguf", output="demo.json")
    quantised.export("demo-mixed.gguf")
    print(halfbyte.evaluate("demo", gguf="demo-mixed.gguf").quality.kld_mean)

Keyword options are the flags of the commands (``docs/options.md``). What is wrong is a :class:`HalfbyteError`. To see
progress, listen: ``with halfbyte.listening(print): …``. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.arguments import options_of
from halfbyte.options import (
    CompareOptions,
    EvalOptions,
    SearchOptions,
    SimulateOptions,
)

if TYPE_CHECKING:
    from halfbyte.evaluate.compare import Comparison
    from halfbyte.evaluate.evaluate import Evaluation
    from halfbyte.evaluate.simulate import SimulationResult
    from halfbyte.pipeline import SearchResult
    from halfbyte.plan import Plan
    from halfbyte.targets.gguf_files.export import ExportResult
    from halfbyte.targets.vllm_files.export import VllmExportResult


@dataclass(frozen=True)
class Quantized:
    """A plan on disk, with its codes beside it, and what can be done with it.

    Attributes:
        path: the plan's file.
        plan: the choice for every layer, and how it was made.
        search: what the search found, if it was run just now.
    """

    path: Path
    plan: Plan
    search: SearchResult | None = field(default=None, repr=False)

    def export(self, output: str | Path | None = None, **options: Any) -> ExportResult | VllmExportResult:
        """Write the model for an engine; see :func:`export`."""
        return export(self, output, **options)

    def simulate(self, **options: Any) -> SimulationResult:
        """Run the plan in PyTorch, beside the original, all A8 and all A4; see :func:`simulate`."""
        return simulate(self, **options)

    def compare(self, **options: Any) -> Comparison:
        """Measure original, Q4_K_M and the exported file in real engines; see :func:`compare`."""
        return compare(self, **options)


def quantize(model_id: str | Path, *, target: str = "gguf", **options: Any) -> Quantized:
    """Search a plan for a model and write it, with its codes and reports beside it.

    Args:
        model_id: Hugging Face id, local folder, .gguf file, or ``demo``.
        target: where the plan will run: ``gguf``, ``vllm`` or ``sim``.
        options: further fields of :class:`halfbyte.options.SearchOptions`, such as ``output`` (a .pt or .json file),
            ``target_compression`` (mean activation bits / 8), ``size`` of the file, ``device``, ``force``.

    Raises:
        HalfbyteError: an unknown option, or anything else that the caller can put right.
    """
    from halfbyte.core.distributed import joined
    from halfbyte.pipeline import search

    chosen = options_of(SearchOptions, {"model_id": model_id, "target": target, **options}, where="quantize")
    with joined():
        result = search(chosen)
    return Quantized(Path(chosen.output), result.plan, result)


def load_plan(path: str | Path) -> Quantized:
    """A plan that was written before.

    Raises:
        HalfbyteError: it is missing or damaged, or the codes beside it belong to another plan.
    """
    from halfbyte.plan import load_plan as load

    return Quantized(Path(path), load(path))


def export(
    plan: Quantized | str | Path, output: str | Path | None = None, **options: Any
) -> ExportResult | VllmExportResult:
    """Write a plan's model as files that an engine runs, and check them.

    Args:
        plan: the plan, or its path.
        output: what the plan's target writes: a GGUF file, or a folder for vLLM; by default in ``models/``.
        options: further fields of :class:`halfbyte.options.ExportOptions`, or of ``VllmExportOptions``.

    Raises:
        HalfbyteError: an unknown option, a plan for another target, or files that do not pass the check: nothing is
            left of them.
    """
    from halfbyte.targets import TARGETS

    at_hand = plan if isinstance(plan, Quantized) else load_plan(plan)
    target = TARGETS.find(at_hand.plan.target, where=at_hand.path)
    given = {"config": at_hand.path, "output": output, **options}
    return target.export(options_of(target.export_options, given, where="export"))


def simulate(plan: Quantized | str | Path, **options: Any) -> SimulationResult:
    """Perplexity, KL and top-1 of a plan in PyTorch, beside the original, all A8 and all A4.

    Args:
        plan: the plan, or its path.
        options: further fields of :class:`halfbyte.options.SimulateOptions`.

    Raises:
        HalfbyteError: an unknown option, another model, or too little memory.
    """
    from halfbyte.evaluate.simulate import simulate as run

    return run(options_of(SimulateOptions, {"config": _path(plan), **options}, where="simulate"))


def evaluate(
    model_id: str | Path,
    *,
    plan: Quantized | str | Path | None = None,
    gguf: str | Path | None = None,
    served: str | Path | None = None,
    **options: Any,
) -> Evaluation:
    """Perplexity of a plan, file, folder or the model itself, and its KL (nats per token) and top-1 against the model.

    Args:
        model_id: the reference.
        plan: evaluate this plan, simulated in PyTorch.
        gguf: or this file, in llama.cpp.
        served: or this folder, in vLLM.
        options: further fields of :class:`halfbyte.options.EvalOptions`, such as ``text``, ``ctx``, ``chunks``.

    Raises:
        HalfbyteError: an unknown option, or anything else that the caller can put right.
    """
    from halfbyte.evaluate.evaluate import evaluate as run

    given = {"model_id": model_id, "config": None if plan is None else _path(plan)}
    return run(options_of(EvalOptions, {**given, "gguf": gguf, "served": served, **options}, where="evaluate"))


def compare(plan: Quantized | str | Path | None = None, **options: Any) -> Comparison:
    """Speed, memory and quality of the original, its Q4_K_M file and the mixed file, each in a process of its own.

    Args:
        plan: for the model and the text it has not seen; by default the plan of the default name, if it is there.
        options: further fields of :class:`halfbyte.options.CompareOptions`, such as ``mixed_path``.

    Raises:
        HalfbyteError: an unknown option, or nothing could be measured.
    """
    from halfbyte.evaluate.compare import compare as run

    given = {} if plan is None else {"config": _path(plan)}
    return run(options_of(CompareOptions, {**given, **options}, where="compare"))


def _path(plan: Quantized | str | Path) -> str | Path:
    return plan.path if isinstance(plan, Quantized) else plan
