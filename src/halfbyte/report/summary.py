"""What is said of each result: text for the terminal, made of values alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from halfbyte.report.tables import (
    MISSING,
    Cell,
    format_bytes,
    format_ratio,
    format_seconds,
    significant,
    text_table,
)

if TYPE_CHECKING:
    from halfbyte.calibration.imatrix_file import Importance
    from halfbyte.evaluate.compare import CompareRow, Comparison
    from halfbyte.evaluate.evaluate import Evaluation
    from halfbyte.evaluate.simulate import SimulationResult
    from halfbyte.pipeline import SearchResult
    from halfbyte.plan import Plan
    from halfbyte.report.doctor import Finding
    from halfbyte.report.page import Record
    from halfbyte.report.page.compared import Row
    from halfbyte.search.run import Found
    from halfbyte.targets.gguf_files.export import ExportResult
    from halfbyte.targets.vllm_files.export import VllmExportResult

COMPARISON_HEADERS = (
    "model",
    "size",
    "KL",
    "top-1",
    "ppl",
    "gen tok/s",
    "speed-up",
    "prompt tok/s",
    "peak memory",
    "load",
    "engine",
)
LLAMACPP_ROUNDS = (
    "llama.cpp computes with 8-bit activations, whatever the plan's A4/A8 choice: a file chooses weight types."
)


def search_summary(result: SearchResult, seconds: Mapping[str, float]) -> str:
    """What was found and what it had to beat, what it costs, and what it took.

    Args:
        seconds: spent in each stage.
    """
    plan = result.plan
    lines = []
    if "activations" in result.found:
        lines += [*_found(result.found["activations"]), _activation_bits(plan)]
    if "types" in result.found:
        found = result.found["types"]
        heading = "\nggml types, activations left alone" if lines else "ggml types"
        lines += [heading, *_found(found), _file_types(plan, found)]
    note = f" ({plan.text['note']})" if plan.text.get("note") else ""
    lines.append(f"plan {plan.hash}, text {plan.text['name']}{note}")
    notes = Counter(outcome.note for outcome in result.outcomes if outcome.note)
    lines += [f"{count} layers: {note}" for note, count in notes.items()]
    lines.append(f"took {sum(seconds.values()):.0f} s, peak memory {format_bytes(result.peak_memory)}")
    return "\n".join(lines)


def _found(found: Found) -> list[str]:
    """Scores of the winner and of what it had to beat, on both texts, and how sure the choice is."""
    headers = ["choice", "search text"]
    rows: list[list[Cell]] = [[label, score] for label, score in found.search_scores.items()]
    if not found.validation_scores:
        return [found.score_label, text_table(headers, rows)]
    labels = dict.fromkeys([*found.search_scores, *found.validation_scores])
    rows = [[label, found.search_scores.get(label), found.validation_scores.get(label)] for label in labels]
    lines = [
        found.score_label,
        text_table([*headers, "validation text"], rows),
        decided(found),
    ]
    return lines if found.refinement is None else [*lines, f"{found.refinement.what}: {found.refinement.said}"]


def decided(found: Found | Record) -> str:
    """Who won, and how sure the choice is."""
    return (
        f"the plan is from: {found.winner}; {found.ties} of {found.finalists} finalists are ties on the validation "
        f"text (noise floor {found.noise_floor:.2g})"
    )


def _activation_bits(plan: Plan) -> str:
    counts = Counter(entry.a_bits for entry in plan.layers.values())
    parts = ", ".join(f"{count} layers A{bits}" for bits, count in sorted(counts.items()))
    return f"{parts}, mean activation bits {8 * plan.budget_reached:.2f} (budget {8 * plan.budget_asked:.2f})"


def _file_types(plan: Plan, found: Found) -> str:
    counts = Counter(plan.tensors.values())
    return f"{format_bytes(found.cost)} of {format_bytes(found.budget)} for {len(plan.tensors)} matrices: " + ", ".join(
        f"{count} {kind}" for kind, count in counts.most_common()
    )


def export_summary(result: ExportResult) -> str:
    """Types and sizes of a GGUF file, and what the check saw."""
    kinds: dict[str, list[int]] = {}
    for row in result.rows:
        kinds.setdefault(row.type, []).append(row.nbytes)
    rows = [[kind, len(sizes), format_bytes(sum(sizes))] for kind, sizes in kinds.items()]
    lines = [text_table(["type", "tensors", "size"], rows)]
    what = "the W4A8 simulation" if result.policy == "exact" else "the simulation with these weights"
    if result.kl is not None and result.top1 is not None:
        lines.append(
            f"checked: {len(result.rows)} tensors read back, {result.exact} matrices hold exactly what was searched; "
            f"llama.cpp against {what}: KL {result.kl:.2g} nats per token, top-1 {_percent(result.top1)}"
        )
    lines.append(LLAMACPP_ROUNDS)
    lines.append(f"policy {result.policy}, {format_bytes(result.path.stat().st_size)}")
    return "\n".join(lines)


def vllm_export_summary(result: VllmExportResult) -> str:
    """What a folder's layers are computed as, its size, and what the check saw."""
    lines = [text_table(["computed as", "layers"], [[group, count] for group, count in result.groups.items()])]
    if result.checked:
        logits = (
            f"logits not compared: {result.skipped}"
            if result.difference is None
            else f"transformers against the simulation: logits differ by at most {result.difference:.1g}"
        )
        lines.append(f"checked: {result.checked} tensors read back; {logits}")
    lines.append(f"{result.tensors} tensors, {format_bytes(result.nbytes)}")
    return "\n".join(lines)


def comparison_summary(comparison: Comparison) -> str:
    """One line per model that was measured, the reason for each one that is missing, and the sample texts."""
    rows = comparison.rows
    against = (
        "; KL and top-1 against the F16 original in llama.cpp, speed-up over its generation"
        if comparison.against_original
        else ""
    )
    scored = f"{comparison.chunks} windows of {comparison.ctx}, second half scored"
    return "\n".join(
        [
            text_table(COMPARISON_HEADERS, [comparison_cells(row) for row in rows if row.measured]),
            *(f"{row.name}: {row.missing}" for row in rows if row.missing),
            *(f"{row.name}: {row.note}" for row in rows if row.note),
            f"text {comparison.text}, {scored}{against}",
            f"prompt: {comparison.prompt}",
            *(
                f"\n[{row.name}, {row.engine}] {row.measured.sample.strip()}"
                for row in rows
                if row.measured and row.measured.sample
            ),
        ]
    )


def comparison_cells(row: CompareRow | Row) -> list[str]:
    """The cells of a model that was measured, under :data:`COMPARISON_HEADERS`."""
    measured, quality = row.measured, row.quality
    assert measured is not None
    return [
        row.name,
        format_bytes(measured.bytes),
        significant(quality.kld_mean if quality else None),
        _percent(quality.top1_agreement if quality else None) or MISSING,
        significant(quality.ppl if quality else None, 4),
        significant(measured.generation_tokens_per_second),
        format_ratio(row.speed_up),
        significant(measured.prompt_tokens_per_second),
        format_bytes(measured.peak_memory),
        format_seconds(measured.load_seconds),
        row.engine,
    ]


def simulation_summary(result: SimulationResult) -> str:
    """The table of simulations, what made it, and the sample texts."""
    rows: list[list[Cell]] = [
        [
            row.name,
            row.mean_bits,
            row.quality.ppl,
            row.quality.kld_mean,
            row.quality.kld_p99,
            _percent(row.quality.top1_agreement),
        ]
        for row in result.rows
    ]
    plan, tokens = result.plan, result.rows[0].quality.tokens
    return "\n".join(
        [
            text_table(["simulation", "mean A bits", "ppl", "KL", "KL 99%", "top-1"], rows),
            f"plan {plan.hash}, text {result.text}, {tokens} tokens, seed {plan.seed}, {result.versions['device']}",
            *(f"\n[{row.name}] {row.sample}" for row in result.rows),
        ]
    )


def evaluation_summary(result: Evaluation) -> str:
    """The numbers on one line, and what they are about."""
    quality = result.quality
    headers = ["ppl", "ppl of the reference", "KL", "KL 99%", "top-1", "tokens"]
    cells: list[Cell] = [quality.ppl, quality.ppl_reference, quality.kld_mean, quality.kld_p99]
    lines = [
        text_table(headers, [[*cells, _percent(quality.top1_agreement), quality.tokens]]),
        f"{result.evaluated} in {result.engine}, text {result.text}",
    ]
    lines += [f"vLLM: {kernel}" for kernel in result.kernels]
    if result.tokenizers_agree is False:
        lines.append("note: llama.cpp and the tokenizer split this text differently; llama.cpp's tokens were scored")
    return "\n".join(lines)


def imatrix_summary(made: Importance) -> str:
    """How many matrices, of which text."""
    return f"{len(made.values)} matrices, {made.tokens} tokens of {', '.join(made.texts)}"


def doctor_summary(findings: Sequence[Finding]) -> str:
    """One line per finding."""
    width = max(len(finding.topic) for finding in findings)
    return "\n".join(f"{finding.topic:<{width}}  {finding.text}" for finding in findings)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"
