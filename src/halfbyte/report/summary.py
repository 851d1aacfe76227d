"""What is said of each result: text for the terminal, made of values alone."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from halfbyte.core.language import say
from halfbyte.options import DEFAULT_PLAN
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
    from halfbyte.evaluate.simulate import SimulationResult, SimulationRow
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


def search_summary(result: SearchResult, config: str, *, verbose: bool = False) -> str:
    """What was found, what it took, and what to do next.

    Args:
        config: the plan's file, as it was named.
        verbose: also what it had to beat, on both texts, and what is special about layers.
    """
    plan, lines = result.plan, []
    if "activations" in result.found:
        found = result.found["activations"]
        lines.append(f"{activation_bits(plan)}; {_score(found)}")
        lines += _details(found) if verbose else []
    if "types" in result.found:
        found = result.found["types"]
        lines.append(f"{_file_types(plan, found)}; {_score(found)}")
        lines += _details(found) if verbose else []
    if verbose:
        note = f" ({plan.text['note']})" if plan.text.get("note") else ""
        lines.append(say("text {name}", name=f"{plan.text['name']}{note}"))
        notes = Counter(outcome.note for outcome in result.outcomes if outcome.note)
        lines += [say("{count} layers: {note}", count=count, note=note) for note, count in notes.items()]
    seconds = sum(stage.seconds for stage in result.stages.values())
    peak = format_bytes(result.peak_memory)
    lines.append(say("took {time}, peak memory {memory}", time=format_seconds(seconds), memory=peak))
    lines.append(_next(NEXT[plan.target].format(given_config(config))))
    return "\n".join(lines)


NEXT = {
    "gguf": "halfbyte export{0}",
    "vllm": "halfbyte export vllm{0}",
    "sim": "halfbyte simulate{0}",
}


def given_config(config: str) -> str:
    """``--config`` where the plan has not the usual name."""
    return "" if config == DEFAULT_PLAN else f" --config {shlex.quote(config)}"


def _next(command: str) -> str:
    return say("next: {command}", command=command)


def _score(found: Found) -> str:
    """The plan's score on the text that decided, and those of the ends of the menu or of llama.cpp's types."""
    scores, where = (
        (found.validation_scores, say("validation text"))
        if found.validation_scores
        else (found.search_scores, say("search text"))
    )
    ends = {label: score for label, score in scores.items() if label.startswith(("all ", "types of "))}
    others = [f"{label} {significant(score)}" for label, score in ends.items()]
    beside = f" ({', '.join(others)})" if others else ""
    if not found.score_label.startswith("KL"):
        return f"{found.score_label} {significant(scores.get('plan'))}{beside}"
    said = say("KL {score} on the {text}", score=significant(scores.get("plan")), text=where) + beside
    if found.refinement is None or not found.refined:
        return said
    return say(
        "{score}; {what} {after}", score=said, what=found.refinement.what, after=significant(found.refinement.after)
    )


def _details(found: Found) -> list[str]:
    """Scores of the winner and of what it had to beat, on both texts, and how sure the choice is."""
    headers = [say("choice"), say("search text")]
    rows: list[list[Cell]] = [[label, score] for label, score in found.search_scores.items()]
    if not found.validation_scores:
        return [found.score_label, text_table(headers, rows)]
    labels = dict.fromkeys([*found.search_scores, *found.validation_scores])
    rows = [[label, found.search_scores.get(label), found.validation_scores.get(label)] for label in labels]
    lines = [found.score_label, text_table([*headers, say("validation text")], rows), decided(found)]
    return lines if found.refinement is None else [*lines, f"{found.refinement.what}: {found.refinement.said}"]


def decided(found: Found | Record) -> str:
    """Who won, and how sure the choice is."""
    return say(
        "the plan is from: {winner}; {ties} of {finalists} finalists are ties on the validation text "
        "(noise floor {noise})",
        winner=found.winner,
        ties=found.ties,
        finalists=found.finalists,
        noise=f"{found.noise_floor:.2g}",
    )


def activation_bits(plan: Plan) -> str:
    """How many layers have how many bits, and the mean."""
    counts = Counter(entry.a_bits for entry in plan.layers.values())
    layers = [say("{count} layers A{bits}", count=count, bits=bits) for bits, count in sorted(counts.items())]
    return say(
        "activations: {layers}, {bits} bits on average of {allowed} allowed",
        layers=", ".join(layers),
        bits=f"{8 * plan.budget_reached:.2f}",
        allowed=f"{8 * plan.budget_asked:.2f}",
    )


def _file_types(plan: Plan, found: Found) -> str:
    counts = Counter(plan.tensors.values())
    return say(
        "file: {size} of {allowed} for {count} matrices, {kinds}",
        size=format_bytes(found.cost),
        allowed=format_bytes(found.budget),
        count=len(plan.tensors),
        kinds=", ".join(f"{count} {kind}" for kind, count in counts.most_common()),
    )


def export_summary(result: ExportResult, config: str, *, verbose: bool = False) -> str:
    """Types and size of a GGUF file, and what the check saw."""
    kinds: dict[str, list[int]] = {}
    for row in result.rows:
        kinds.setdefault(row.type, []).append(row.nbytes)
    lines = []
    if verbose:
        rows = [[kind, len(sizes), format_bytes(sum(sizes))] for kind, sizes in kinds.items()]
        lines.append(text_table([say("type"), say("tensors"), say("size")], rows))
    counts = ", ".join(f"{len(sizes)} {kind}" for kind, sizes in kinds.items())
    size = format_bytes(result.path.stat().st_size)
    lines.append(say("{size}, policy {policy}: {kinds}", size=size, policy=result.policy, kinds=counts))
    lines += filter(None, [checked_gguf(result)])
    lines.append(say(LLAMACPP_ROUNDS))
    lines.append(_next(f"halfbyte compare{given_config(config)} --mixed_path {shlex.quote(str(result.path))}"))
    return "\n".join(lines)


def checked_gguf(result: ExportResult) -> str:
    """What the check saw; empty if there was none."""
    if result.kl is None or result.top1 is None:
        return ""
    return say(
        "checked: {tensors} tensors read back, {exact} matrices hold exactly what was searched; llama.cpp against "
        "{simulation}: KL {kl} nats per token, top-1 {top1}",
        tensors=len(result.rows),
        exact=result.exact,
        simulation=say("the W4A8 simulation" if result.policy == "exact" else "the simulation with these weights"),
        kl=f"{result.kl:.2g}",
        top1=_percent(result.top1),
    )


def vllm_export_summary(result: VllmExportResult, config: str) -> str:
    """What a folder's layers are computed as, its size, and what the check saw."""
    lines = [text_table([say("computed as"), say("layers")], list(result.groups.items()))]
    lines += filter(None, [checked_folder(result)])
    lines.append(say("{count} tensors, {size}", count=result.tensors, size=format_bytes(result.nbytes)))
    lines.append(_next(f"halfbyte compare{given_config(config)} --served {shlex.quote(str(result.path))}"))
    return "\n".join(lines)


def checked_folder(result: VllmExportResult) -> str:
    """What the check saw; empty if there was none."""
    if not result.checked:
        return ""
    if result.difference is None:
        logits = say("logits not compared: {why}", why=result.skipped)
    else:
        most = f"{result.difference:.1g}"
        logits = say("transformers against the simulation: logits differ by at most {most}", most=most)
    return say("checked: {tensors} tensors read back; {logits}", tensors=result.checked, logits=logits)


def comparison_summary(comparison: Comparison, *, verbose: bool = False) -> str:
    """One line per model that was measured, and the reason for each one that is missing.

    Args:
        verbose: also the sample texts.
    """
    rows = comparison.rows
    against = (
        say("; KL and top-1 against the F16 original in llama.cpp, speed-up over its generation")
        if comparison.against_original
        else ""
    )
    texts = kl_of_texts(rows)
    scored = say("{count} windows of {ctx}, second half scored", count=comparison.chunks, ctx=comparison.ctx)
    lines = [
        text_table(list(map(say, COMPARISON_HEADERS)), [comparison_cells(row) for row in rows if row.measured]),
        *([] if texts is None else [text_table(*texts)]),
        *(f"{row.name}: {row.missing}" for row in rows if row.missing),
        *(f"{row.name}: {row.note}" for row in rows if row.note),
        say("text {name}, {windows}{against}", name=comparison.text, windows=scored, against=against),
    ]
    if verbose:
        lines.append(say("prompt: {prompt}", prompt=comparison.prompt))
        lines += [
            f"\n[{row.name}, {row.engine}] {row.measured.sample.strip()}"
            for row in rows
            if row.measured and row.measured.sample
        ]
    return "\n".join(lines)


def kl_of_texts(rows: Sequence[CompareRow | Row | SimulationRow]) -> tuple[list[str], list[list[str]]] | None:
    """Headers and rows of the KL on each kind of text; None where there is one kind or no original."""
    found = [(row.name, row.quality.kld_of_texts) for row in rows if row.quality and row.quality.kld_of_texts]
    if not found:
        return None
    texts = list(dict.fromkeys(text for _, own in found for text in own))
    return [say("KL on"), *texts], [[name, *(significant(own.get(text)) for text in texts)] for name, own in found]


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


def simulation_summary(result: SimulationResult, *, verbose: bool = False) -> str:
    """The table of simulations, and what made it.

    Args:
        verbose: also the sample texts.
    """
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
    headers = [say("simulation"), say("mean A bits"), say("ppl"), "KL", "KL 99%", "top-1"]
    about = say(
        "plan {hash}, text {text}, {tokens} tokens, seed {seed}, {device}",
        hash=plan.hash,
        text=result.text,
        tokens=tokens,
        seed=plan.seed,
        device=result.versions["device"],
    )
    texts = kl_of_texts(result.rows)
    samples = [f"\n[{row.name}] {row.sample}" for row in result.rows] if verbose else []
    return "\n".join([text_table(headers, rows), *([text_table(*texts)] if texts else []), about, *samples])


def evaluation_summary(result: Evaluation) -> str:
    """The numbers on one line, and what they are about."""
    quality = result.quality
    headers = [say("ppl"), say("ppl of the reference"), "KL", "KL 99%", "top-1", say("tokens")]
    cells: list[Cell] = [quality.ppl, quality.ppl_reference, quality.kld_mean, quality.kld_p99]
    lines = [
        text_table(headers, [[*cells, _percent(quality.top1_agreement), quality.tokens]]),
        say("{what} in {engine}, text {text}", what=result.evaluated, engine=result.engine, text=result.text),
    ]
    if quality.kld_of_texts:
        kl: list[Cell] = list(quality.kld_of_texts.values())
        lines.insert(1, text_table([say("KL on"), *quality.kld_of_texts], [["", *kl]]))
    lines += [f"vLLM: {kernel}" for kernel in result.kernels]
    if result.tokenizers_agree is False:
        split = say("llama.cpp and the tokenizer split this text differently; llama.cpp's tokens were scored")
        lines.append(say("note: {text}", text=split))
    return "\n".join(lines)


def imatrix_summary(made: Importance) -> str:
    """How many matrices, of which text."""
    texts = ", ".join(made.texts)
    return say("{count} matrices, {tokens} tokens of {texts}", count=len(made.values), tokens=made.tokens, texts=texts)


def doctor_summary(findings: Sequence[Finding]) -> str:
    """One line per finding."""
    width = max(len(finding.topic) for finding in findings)
    return "\n".join(f"{finding.topic:<{width}}  {finding.text}" for finding in findings)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"
