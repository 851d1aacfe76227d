"""The README.md of an exported folder: what it is, the plan's table, and how its numbers were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from halfbyte.core.files import is_hub_id, short_name
from halfbyte.plan import Plan
from halfbyte.report.tables import Cell, markdown_table


def model_card(
    plan: Plan, groups: Mapping[str, int], run: str, tags: Sequence[str], blocks: str, nbytes: int, model_id: str
) -> str:
    """The card as Markdown.

    Args:
        groups: what layers are computed as -> how many.
        run: how to run the folder, Markdown.
        tags: of the format.
        blocks: path of the transformer blocks, such as ``model.layers``.
        nbytes: of all tensors.
        model_id: what was quantised; only a hub id is told as it is, a path says nothing to others.
    """
    base = model_id if is_hub_id(model_id) else short_name(model_id)
    shares: list[list[Cell]] = [[group, count] for group, count in groups.items()]
    transforms = ", ".join(plan.transforms) or "none"
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {base}"] if is_hub_id(model_id) else []),
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "- vllm",
        "- halfbyte",
        "---",
        "",
        f"# {short_name(model_id)}, 4-bit weights, activation bits layer by layer",
        "",
        f"{base} with 4-bit weights. Which layer gets how many activation bits was searched by the whole model's "
        f"behaviour, for vLLM on {plan.hardware} GPUs; {nbytes / 1e9:.2f} GB of tensors.",
        "",
        markdown_table(["computed as", "layers"], shares),
        "",
        run,
        "",
        "## How it was made",
        "",
        markdown_table(["", ""], _made_by(plan, transforms, base), "ll"),
        "",
        "## What was measured",
        "",
        *_measured(plan),
        "## Activation bits",
        "",
        markdown_table(*_bits(plan, blocks)),
        "",
    ]
    return "\n".join(lines)


def _made_by(plan: Plan, transforms: str, base: str) -> list[list[Cell]]:
    note = plan.text.get("note")
    tokens = [
        (key, plan.search[key]) for key in ("calib_tokens", "search_tokens", "valid_tokens") if key in plan.search
    ]
    versions = ", ".join(f"{key} {value}" for key, value in plan.versions.items())
    return [
        ["base model", f"{base} ({plan.fingerprint})"],
        ["plan", plan.hash],
        ["budget", f"{8 * plan.budget_reached:.2f} mean activation bits of {8 * plan.budget_asked:.2f} allowed"],
        ["transforms", transforms],
        ["weight codes", plan.weights],
        ["text", f"{plan.text.get('name', '')}" + (f" ({note})" if note else "")],
        ["tokens", ", ".join(f"{value} {key.removesuffix('_tokens')}" for key, value in tokens)],
        ["seed", str(plan.seed)],
        ["versions", versions],
    ]


def _measured(plan: Plan) -> list[str]:
    """Scores of the plan's search, of the simulation in PyTorch."""
    scores = plan.search.get("scores", {})
    if plan.search.get("fitness") != "kl" or not scores:
        return ["Nothing on the whole model: the search minimised another number.", ""]
    validation = plan.search.get("validation", {})
    rows: list[list[Cell]] = [[name, score, validation.get(name)] for name, score in scores.items()]
    return [
        "KL(original ‖ quantised) of next-token distributions, nats per token, in halfbyte's PyTorch simulation of "
        "this folder; an engine is not part of it. Validation text is none that the search compared candidates on.",
        "",
        markdown_table(["choice", "search text", "validation text"], rows),
        "",
    ]


def _bits(plan: Plan, blocks: str) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows: activation bits per block and kind of layer."""
    rows: dict[str, dict[str, str]] = {}
    for name, entry in plan.layers.items():
        block, _, part = name.removeprefix(f"{blocks}.").partition(".")
        rows.setdefault(block, {})[part.rpartition(".")[2]] = f"A{entry.a_bits}"
    kinds = list(next(iter(rows.values())))
    return ["block", *kinds], [[block, *(row[kind] for kind in kinds)] for block, row in rows.items()]
