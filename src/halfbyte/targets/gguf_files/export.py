"""Export a plan as GGUF, then check the file: read back, run in llama.cpp, compare with the simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.text import pydoc_text
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import mixed_gguf, whole_file
from halfbyte.core.guard import Touched, guarded, model_files
from halfbyte.core.progress import report
from halfbyte.engines import open_engine
from halfbyte.engines.llamacpp import Engine
from halfbyte.evaluate.quality import kl_per_token, same_top, windows_for
from halfbyte.models.loading import SourceModel
from halfbyte.options import ExportOptions
from halfbyte.plan import ADOPTED, Plan, codes_path, load_codes, load_plan, plan_files
from halfbyte.prepare.folding import TransformedBlocks
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.simulation import become_simulation_, become_types_, load_for_plan, load_types, need_activations
from halfbyte.quant.ggml.types import decode, encode
from halfbyte.quant.int4 import PackedWeight
from halfbyte.quant.quant_linear import QuantLinear, set_activation_bits_, set_parameters_
from halfbyte.targets.gguf_files.tensors import EncodedRows, TensorRow
from halfbyte.targets.gguf_files.writer import check_gguf, write_gguf

CHECK_TOKENS = 256
A8_TYPE = "Q8_0"  # of an A8 layer's weights in a tiered file
LARGEST_KL = 0.05  # nats; llama.cpp rounds activations per block of 32, the simulation per token: see docs/methods.md


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
    path = Path(options.output or mixed_gguf(options.model_id or plan.model_id))
    if path.suffix != ".gguf":
        raise HalfbyteError(f"{path}: unknown file format, expected a name that ends in .gguf")
    model = model_files(options.model_id or plan.model_id)
    touched = Touched(inputs=[*plan_files(options.config), *model], outputs=[path])
    with guarded(touched, json=options.json, force=options.force):
        return _exported(options, plan, path)


def _exported(options: ExportOptions, plan: Plan, path: Path) -> ExportResult:
    if plan.target != "gguf":
        raise HalfbyteError(
            f"{options.config}: the plan was made for another target, expected gguf, got {plan.target}",
            fix="search again with --target gguf",
        )
    policy = policy_of(plan, options)
    engine = open_engine(options.engine) if options.check else None
    report("load model", 0, 1, options.model_id or plan.model_id)
    source = load_for_plan(
        plan,
        options.model_id,
        device="cpu",
        dtype="stored",
        trust_remote_code=options.trust_remote_code,
        packed=policy != "tiered",  # which needs the weights of its A8 layers
    )
    content = _content(policy, source, plan, options)
    with whole_file(path) as unchecked:
        rows = write_gguf(
            unchecked,
            source,
            weights=content.weights,
            overrides=content.overrides,
            layer_types=content.types,
            encoded=content.encoded,
            made=content.made,
            metadata=summary(plan, policy),
            embedding_type=options.embedding_type,
            output_type=options.output_type,
        )
        if engine is None:
            return ExportResult(path, rows, policy, 0, None, None, plan)
        report("check", 0, 2, "read back")
        check_gguf(unchecked, source, content.weights, content.overrides, content.types, content.encoded, content.made)
        report("check", 1, 2, "llama.cpp against the simulation")
        exact = content.become_(source, plan, rows)
        kl, top1 = compare_engines(source, engine, unchecked)
        report("check", 2, 2, f"KL {kl:.2g}")
        if not kl <= LARGEST_KL:
            raise HalfbyteError(
                f"{path}: llama.cpp does not agree with the simulation, expected KL below {LARGEST_KL}, got {kl:.3g}",
                fix="nothing was kept; report this as a bug",
            )
    return ExportResult(path, rows, policy, exact, kl, top1, plan)


def policy_of(plan: Plan, options: ExportOptions) -> str:
    """``--policy``: ``budget``, ``exact`` or ``tiered``; ``auto`` is what the plan has.

    A plan without A8 layers is exported ``exact`` where ``tiered`` is asked for: the files would be the same. So is, by
    default, one with the codes of another checkpoint: its folded transforms are not known.

    Raises:
        HalfbyteError: the plan lacks what the policy writes.
    """
    policy, adopted = options.policy, plan.weights.startswith(ADOPTED)
    if policy == "auto":
        policy = "budget" if plan.tensors else "exact" if adopted else "tiered"
    if policy == "budget":
        if not plan.tensors:
            raise HalfbyteError(
                f"{options.config}: the plan has no types", fix="search with --spaces types, or use --policy tiered"
            )
        return policy
    need_activations(plan, options.config)
    if not any(entry.a_bits == 8 for entry in plan.layers.values()):
        return "exact"
    if policy == "tiered" and adopted:
        raise HalfbyteError(
            f"{options.config}: A8 layers in Q8_0 need the weights behind the codes, got codes {plan.weights}",
            fix="use --policy exact",
        )
    return policy


@dataclass(frozen=True)
class _Content:
    """What goes into the file, and how the model becomes what the file holds."""

    become_: Callable[[SourceModel, Plan, list[TensorRow]], int]  # returns how many matrices are exactly the plan's
    weights: Mapping[str, PackedWeight] = field(default_factory=dict)
    overrides: Mapping[str, torch.Tensor] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    encoded: Mapping[str, EncodedRows] = field(default_factory=dict)
    made: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)


def _content(policy: str, source: SourceModel, plan: Plan, options: ExportOptions) -> _Content:
    if policy == "budget":
        return _types(options)
    return _tiered(source, plan, options) if policy == "tiered" else _exact(options)


def _types(options: ExportOptions) -> _Content:
    """The matrices as they were encoded when they were searched."""
    encoded = load_types(options.config)
    rows = {name: EncodedRows(kind, encoded.rows(name, kind)) for name, (kind,) in encoded.types().items()}

    def become_(source: SourceModel, plan: Plan, rows: list[TensorRow]) -> int:
        become_types_(source, plan.tensors, encoded)
        return len(plan.tensors)

    return _Content(become_, overrides=encoded.extra, encoded=rows)


def _exact(options: ExportOptions) -> _Content:
    """Every layer's codes."""
    codes = load_codes(codes_path(options.config))

    def become_(source: SourceModel, plan: Plan, rows: list[TensorRow]) -> int:
        become_simulation_(source, codes, plan.layers, packed=True)  # run once: memory counts
        set_activation_bits_(source.model, dict.fromkeys(codes.weights, 8))
        as_in_file_(source, rows)
        return len(codes.weights)

    return _Content(become_, codes.weights, codes.parameters)


def _tiered(source: SourceModel, plan: Plan, options: ExportOptions) -> _Content:
    """The codes of A4 layers; A8 layers in Q8_0 from the weights that their codes were chosen for."""
    codes = load_codes(codes_path(options.config))
    recipe = Recipe(plan.transforms, plan.weights)
    transformed = TransformedBlocks(source, recipe, codes.channel_scales, where=options.config)
    eight = [name for name, entry in plan.layers.items() if entry.a_bits == 8]
    four = {name: weight for name, weight in codes.weights.items() if plan.layers[name].a_bits == 4}

    def become_(source: SourceModel, plan: Plan, rows: list[TensorRow]) -> int:
        decoded: dict[str, torch.Tensor] = {}
        for name in eight:
            decoded[name] = _rounded(transformed.weight(name), A8_TYPE).to(source.dtype)
            set_parameters_(source.model, {f"{name}.weight": decoded[name]})  # the original makes room
        become_simulation_(source, codes, plan.layers, packed=True)
        for name, weight in decoded.items():
            old = source.model.get_submodule(name)
            assert isinstance(old, QuantLinear)
            source.model.set_submodule(name, QuantLinear(weight, old.bias, old.scheme, old.shared))
        set_activation_bits_(source.model, dict.fromkeys(codes.weights, 8))
        as_in_file_(source, rows)
        return len(four)

    made = {name: partial(transformed.weight, name) for name in eight}
    return _Content(become_, four, codes.parameters, dict.fromkeys(eight, A8_TYPE), made=made)


def _rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The fp32 values that ``weight`` has in a file, where it is of type ``kind``."""
    return torch.from_numpy(decode(encode(weight.float(), kind), kind)).view(weight.shape)


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
        values["plan.types_kl"] = float(plan.file["validation"].get("plan, refined", plan.file["validation"]["plan"]))
    return values


def as_in_file_(source: SourceModel, rows: list[TensorRow]) -> None:
    """Give embedding and head the values that the file's types hold, in place."""
    parameters = dict(source.model.named_parameters())
    top = [f"{source.family.embedding}.weight", f"{source.family.head}.weight"]
    for row in rows:
        if row.parameter in top and row.parameter in parameters:
            target = parameters[row.parameter]
            with torch.no_grad():
                target.copy_(_rounded(target, row.type))


def compare_engines(source: SourceModel, engine: Engine, path: Path) -> tuple[float, float]:
    """(mean KL, top-1 agreement) of llama.cpp on ``path`` against the simulation in ``source``, on a short text."""
    window = windows_for(source, pydoc_text(), CHECK_TOKENS, 1, where="check text")[0]
    with torch.no_grad():
        ours = source.model(input_ids=torch.tensor([window]), use_cache=False).logits[0].float()
    with engine.load(path, n_ctx=CHECK_TOKENS) as model:
        theirs = torch.from_numpy(model.logits(window))
    if theirs.shape != ours.shape:
        raise HalfbyteError(
            f"{path}: llama.cpp reads another vocabulary, expected {ours.shape[-1]}, got {theirs.shape[-1]}"
        )
    return float(kl_per_token(ours, theirs).mean()), float(same_top(ours, theirs).float().mean())
