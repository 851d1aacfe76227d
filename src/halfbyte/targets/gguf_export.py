"""Export a plan as GGUF, then check the file: read back, run in llama.cpp, compare with the simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.text import pydoc_text
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_output, whole_file
from halfbyte.core.naming import mixed_gguf
from halfbyte.core.progress import report
from halfbyte.engines import open_engine
from halfbyte.engines.llamacpp import Engine
from halfbyte.evaluate.quality import kl_per_token, same_top, windows_for
from halfbyte.evaluate.simulation import become_simulation_, become_types_, load_for_plan, load_types, need_activations
from halfbyte.models.loading import SourceModel
from halfbyte.options import ExportOptions
from halfbyte.plan import Plan, codes_path, load_codes, load_plan
from halfbyte.quant.ggml.types import decode, encode
from halfbyte.quant.int4 import PackedWeight
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.targets.gguf_file import check_gguf, write_gguf
from halfbyte.targets.gguf_tensors import EncodedRows, TensorRow

CHECK_TOKENS = 256
LARGEST_KL = 0.05  # nats; llama.cpp rounds activations per block of 32, the simulation per token: see docs/numbers.md


@dataclass(frozen=True)
class ExportResult:
    """What an export leaves.

    Attributes:
        path: the file.
        rows: its tensors.
        policy: how types were chosen.
        exact: layers whose blocks were read back and hold exactly the plan's codes; 0 if the check was skipped.
        kl, top1: llama.cpp against the W4A8 simulation on a short text; None if the check was skipped.
        plan: what was exported.
    """

    path: Path
    rows: list[TensorRow]
    policy: str
    exact: int
    kl: float | None
    top1: float | None
    plan: Plan


def export_gguf(options: ExportOptions) -> ExportResult:
    """Write the plan as GGUF.

    Raises:
        HalfbyteError: anything the user can put right, or a check that failed; a file appears only once it is checked.
    """
    plan = load_plan(options.config)
    path = check_output(options.output or mixed_gguf(options.model_id or plan.model_id), force=options.force)
    if path.suffix != ".gguf":
        raise HalfbyteError("unknown file format", where=path, expected="a name that ends in .gguf")
    if plan.target != "gguf":
        raise HalfbyteError(
            "the plan was made for another target",
            where=options.config,
            expected="gguf",
            got=plan.target,
            fix="search again with --target gguf",
        )
    policy = policy_of(plan, options)
    engine = open_engine(options.engine) if options.check else None
    report("load model", 0, 1, options.model_id or plan.model_id)
    source = load_for_plan(
        plan, options.model_id, device="cpu", dtype="stored", trust_remote_code=options.trust_remote_code, packed=True
    )
    content = _types(options) if policy == "budget" else _codes(plan, options, policy)
    with whole_file(path) as unchecked:
        rows = write_gguf(
            unchecked,
            source,
            weights=content.weights,
            overrides=content.overrides,
            layer_types=content.types,
            encoded=content.encoded,
            metadata=summary(plan, policy),
            embedding_type=options.embedding_type,
            output_type=options.output_type,
        )
        if engine is None:
            return ExportResult(path, rows, policy, 0, None, None, plan)
        report("check", 0, 2, "read back")
        check_gguf(unchecked, source, content.weights, content.overrides, content.types, content.encoded)
        report("check", 1, 2, "llama.cpp against the simulation")
        exact = content.become_(source, plan, rows)
        kl, top1 = compare_engines(source, engine, unchecked)
        report("check", 2, 2, f"KL {kl:.2g}")
        if not kl <= LARGEST_KL:
            raise HalfbyteError(
                "llama.cpp does not agree with the simulation",
                where=path,
                expected=f"KL below {LARGEST_KL}",
                got=f"{kl:.3g}",
                fix="nothing was kept; report this as a bug",
            )
    return ExportResult(path, rows, policy, exact, kl, top1, plan)


def policy_of(plan: Plan, options: ExportOptions) -> str:
    """``--policy``, or what the plan has.

    Raises:
        HalfbyteError: the plan lacks what the policy writes.
    """
    policy = options.policy
    if policy == "auto":
        policy = "budget" if plan.tensors else "exact"
    if policy == "budget" and not plan.tensors:
        raise HalfbyteError(
            "the plan has no types",
            where=options.config,
            fix="search with --spaces ggml, or use --policy exact",
        )
    if policy != "budget":
        need_activations(plan, options.config)
    return policy


@dataclass(frozen=True)
class _Content:
    """What goes into the file, and how the model becomes what the file holds."""

    become_: Callable[[SourceModel, Plan, list[TensorRow]], int]  # returns how many matrices are exactly the plan's
    weights: Mapping[str, PackedWeight] = field(default_factory=dict)
    overrides: Mapping[str, torch.Tensor] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    encoded: Mapping[str, EncodedRows] = field(default_factory=dict)


def _types(options: ExportOptions) -> _Content:
    """The matrices as they were encoded when they were searched."""
    encoded = load_types(options.config)
    rows = {name: EncodedRows(kind, encoded.rows(name, kind)) for name, (kind,) in encoded.types().items()}

    def become_(source: SourceModel, plan: Plan, rows: list[TensorRow]) -> int:
        become_types_(source, plan.tensors, encoded)
        return len(plan.tensors)

    return _Content(become_, overrides=encoded.extra, encoded=rows)


def _codes(plan: Plan, options: ExportOptions, policy: str) -> _Content:
    """W4 codes, in Q8_0 where the policy says so."""
    codes = load_codes(codes_path(options.config))
    types = {name: "Q8_0" for name, entry in plan.layers.items() if policy == "tiered" and entry.a_bits == 8}

    def become_(source: SourceModel, plan: Plan, rows: list[TensorRow]) -> int:
        become_simulation_(source, codes, plan.layers, plan.transforms, packed=True)  # run once: memory counts
        set_activation_bits_(source.model, dict.fromkeys(codes.weights, 8))
        as_in_file_(source, rows)
        return sum(row.type == "Q4_0" and row.parameter.removesuffix(".weight") in codes.weights for row in rows)

    return _Content(become_, codes.weights, codes.parameters, types)


def summary(plan: Plan, policy: str) -> dict[str, str | int | float]:
    """The plan as GGUF metadata: what was asked, what was reached, how to tell it again."""
    a8 = sum(entry.a_bits == 8 for entry in plan.layers.values())
    values: dict[str, Any] = {
        "plan.hash": plan.hash,
        "plan.model_id": plan.model_id,
        "plan.fingerprint": plan.fingerprint,
        "plan.policy": policy,
        "plan.granularity": plan.granularity,
        "plan.budget_asked": plan.budget_asked,
        "plan.budget_reached": plan.budget_reached,
        "plan.layers_a8": a8,
        "plan.layers_a4": len(plan.layers) - a8,
        "plan.transforms": ",".join(plan.file["transforms"] if policy == "budget" else plan.transforms) or "none",
        "plan.weights": plan.weights,
        "plan.text": str(plan.text.get("name", "")),
        "plan.text_search": str(plan.text.get("search", "")),
        "plan.seed": plan.seed,
        "version": plan.versions.get("halfbyte", ""),
    }
    if policy == "budget":
        values["plan.types_kl"] = float(plan.file["losses"]["plan"])
    return values


def as_in_file_(source: SourceModel, rows: list[TensorRow]) -> None:
    """Give embedding and head the values that the file's types hold, in place."""
    parameters = dict(source.model.named_parameters())
    top = [f"{source.family.embedding}.weight", f"{source.family.head}.weight"]
    for row in rows:
        if row.parameter in top and row.parameter in parameters:
            target = parameters[row.parameter]
            with torch.no_grad():
                target.copy_(torch.from_numpy(decode(encode(target.float(), row.type), row.type)).view(target.shape))


def compare_engines(source: SourceModel, engine: Engine, path: Path) -> tuple[float, float]:
    """(mean KL, top-1 agreement) of llama.cpp on ``path`` against the simulation in ``source``, on a short text."""
    window = windows_for(source, pydoc_text(), CHECK_TOKENS, 1, where="check text")[0]
    with torch.no_grad():
        ours = source.model(input_ids=torch.tensor([window]), use_cache=False).logits[0].float()
    with engine.load(path, n_ctx=CHECK_TOKENS) as model:
        theirs = torch.from_numpy(model.logits(window))
    if theirs.shape != ours.shape:
        raise HalfbyteError(
            "llama.cpp reads another vocabulary", where=path, expected=ours.shape[-1], got=theirs.shape[-1]
        )
    return float(kl_per_token(ours, theirs).mean()), float(same_top(ours, theirs).float().mean())
