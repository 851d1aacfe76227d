"""What each command does: call the library, draw tables, and give back what ``--json`` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte.core.environment import peak_process_memory
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_output
from halfbyte.options import (
    DEFAULT_MODEL,
    CompareOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    ImatrixOptions,
    SearchOptions,
    SimulateOptions,
    VllmExportOptions,
)
from halfbyte.report.terminal import Drawing
from halfbyte.transforms import in_order


def search(options: SearchOptions, draw: Drawing) -> dict[str, Any]:
    """Search an allocation and write the plan."""
    from halfbyte.core.distributed import joined
    from halfbyte.pipeline import search as run
    from halfbyte.report.model_card import R4_COSTS
    from halfbyte.report.tables import Cell, format_bytes, text_table
    from halfbyte.results import score_label

    _check_json(options.json, options.force)
    if options.json and Path(options.json).resolve() == Path(options.output).resolve():
        raise HalfbyteError("two outputs in one file", where=options.json, fix="give --json another name")
    with joined() as group:
        draw.quiet = not group.first
        result = run(options, group)
    draw.finish()
    plan, scores = result.plan, {}
    if result.activations is not None:
        found = result.activations.found
        scores = dict(found.scores)
        headers = ["allocation", "search text"]
        rows: list[list[Cell]] = [[name, score] for name, score in scores.items()]
        if "validation" in found.about:
            headers.append("validation text")
            rows = [[*row, found.about["validation"][row[0]]] for row in rows]
        draw.say(score_label(options.fitness))
        draw.say(text_table(headers, rows))
        if "validation" in found.about:
            draw.say(f"the plan is from: {_origin(found.about)}")
        a8 = [name for name, entry in plan.layers.items() if entry.a_bits == 8]
        draw.say(
            f"{len(a8)} of {len(plan.layers)} layers A8, mean activation bits {8 * plan.budget_reached:.2f} "
            f"(budget {8 * plan.budget_asked:.2f})"
        )
    if result.types is not None:
        types = result.types
        draw.say("\nggml types, activations left alone: " + score_label("kl"))
        draw.say(text_table(["mixture", "validation text"], [[name, loss] for name, loss in types.losses.items()]))
        draw.say(f"the plan is from: {_origin(types.about)}")
        counts = Counter(types.types.values())
        draw.say(
            f"{format_bytes(types.nbytes)} of {format_bytes(types.capacity)} for {len(types.types)} matrices: "
            + ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        )
        speed = types.about["predicted_speed"]
        draw.say(f"generation on a CPU, predicted: {speed:.2f} of the speed of llama.cpp's {types.about['rival']}")
    note = f" ({plan.text['note']})" if plan.text["note"] else ""
    draw.say(f"plan {plan.hash}, text {plan.text['name']}{note}")
    notes: dict[str, int] = {}
    for outcome in result.outcomes:
        if outcome.note:
            notes[outcome.note] = notes.get(outcome.note, 0) + 1
    for note, count in notes.items():
        draw.say(f"{count} layers: {note}")
    measured = {
        "seconds": draw.seconds,
        "peak_memory": result.peak_memory,
        "preparation_memory": result.activations.preparation_memory if result.activations else None,
        "peak_host": peak_process_memory(),
    }
    if plan.target == "vllm" and any(known.at_run_time for known in in_order(plan.transforms)):
        draw.say(R4_COSTS)
    draw.say(f"took {sum(draw.seconds.values()):.0f} s, peak memory {format_bytes(result.peak_memory)}")
    draw.files(result.files)
    files = [str(path) for path in result.files]
    return {
        "plan": plan.to_dict(),
        "hash": plan.hash,
        "scores": scores,
        "measured": measured,
        "files": files,
    }


def _origin(about: Mapping[str, Any]) -> str:
    return (
        f"{about['winner']}; {about['ties']} of {about['finalists']} finalists are ties on the validation text "
        f"(noise floor {about['noise_floor']:.2g})"
    )


def export(options: ExportOptions, draw: Drawing) -> dict[str, Any]:
    """Write a plan as a GGUF file and check it."""
    from halfbyte.report.tables import format_bytes, text_table
    from halfbyte.targets.gguf_export import export_gguf

    _check_json(options.json, options.force)
    result = export_gguf(options)
    draw.finish()
    kinds: dict[str, list[int]] = {}
    for row in result.rows:
        entry = kinds.setdefault(row.type, [0, 0])
        entry[0] += 1
        entry[1] += row.nbytes
    draw.say(
        text_table(["type", "tensors", "size"], [[kind, n, format_bytes(size)] for kind, (n, size) in kinds.items()])
    )
    what = "the W4A8 simulation" if result.policy != "budget" else "the simulation with these weights"
    if result.kl is not None and result.top1 is not None:
        draw.say(
            f"checked: {len(result.rows)} tensors read back, {result.exact} matrices hold exactly what was searched; "
            f"llama.cpp against {what}: KL {result.kl:.2g} nats per token, same top token {100 * result.top1:.1f}%"
        )
    draw.say(
        "llama.cpp computes with 8-bit activations, whatever the plan's A4/A8 choice: a file chooses weight types."
    )
    draw.files([result.path])
    size = result.path.stat().st_size
    draw.say(f"policy {result.policy}, {format_bytes(size)}")
    return {
        "path": str(result.path),
        "bytes": size,
        "policy": result.policy,
        "kl": result.kl,
        "top1": result.top1,
        "plan": result.plan.hash,
    }


def export_vllm(options: VllmExportOptions, draw: Drawing) -> dict[str, Any]:
    """Write a plan as a folder for vLLM and transformers and check it."""
    from halfbyte.report.model_card import R4_COSTS
    from halfbyte.report.tables import format_bytes, text_table
    from halfbyte.targets.vllm_export import export_vllm as run

    _check_json(options.json, options.force)
    result = run(options)
    draw.finish()
    draw.say(text_table(["config group", "layers"], [[group, count] for group, count in result.groups.items()]))
    if result.checked:
        draw.say(
            f"checked: {result.checked} tensors read back; "
            + (
                f"logits not compared: {result.skipped}"
                if result.difference is None
                else f"transformers against the simulation: logits differ by at most {result.difference:.1g}"
            )
        )
    if any(known.at_run_time for known in in_order(result.plan.transforms)):
        draw.say(R4_COSTS)
    draw.files([result.path])
    draw.say(f"{result.tensors} tensors, {format_bytes(result.nbytes)}")
    return {
        "path": str(result.path),
        "bytes": result.nbytes,
        "groups": result.groups,
        "difference": result.difference,
        "not_compared": result.skipped,
        "plan": result.plan.hash,
    }


def compare(options: CompareOptions, draw: Drawing) -> dict[str, Any]:
    """Original, Q4_K_M and mixed: speed, quality, memory."""
    from halfbyte.evaluate.compare import compare as run
    from halfbyte.evaluate.simulation import evaluation_text
    from halfbyte.plan import load_plan
    from halfbyte.report.comparison import comparison_table, comparison_texts

    _check_json(options.json, options.force)
    plan = None
    if Path(options.config).exists():
        plan = load_plan(options.config, with_codes=False)
    elif options.config != CompareOptions().config:
        raise HalfbyteError("no such plan", where=options.config)
    model_id = options.model_id or (plan.model_id if plan else DEFAULT_MODEL)
    text = evaluation_text(options.text, plan.text.get("search") if plan else None)
    rows = run(options, model_id, text, plan.hash if plan else None)
    draw.finish()
    draw.say(comparison_table(rows))
    against = (
        ""
        if options.skip_original
        else "; KLD and top-1 against the F16 original in llama.cpp, speed-up over its generation"
    )
    draw.say(f"text {text[0]}, {options.chunks} windows of {options.ctx}, second half scored{against}")
    draw.say(comparison_texts(rows, options.prompt))
    return {
        "model": model_id,
        "plan": plan.hash if plan else None,
        "text": text[0],
        "ctx": options.ctx,
        "chunks": options.chunks,
        "seed": plan.seed if plan else None,
        "machine": _machine(),
        "versions": {name: _version(name) for name in ("halfbyte", "torch", "transformers", "xllamacpp")},
        "rows": [_without_tokens(asdict(row)) for row in rows],
    }


def _without_tokens(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the comparison for JSON, without what only its computation needed."""
    measured = {key: value for key, value in (row["measured"] or {}).items() if key not in ("windows", "logits_file")}
    return {**row, "measured": measured or None}


def simulate(options: SimulateOptions, draw: Drawing) -> dict[str, Any]:
    """The plan in PyTorch, beside the original, all A8 and all A4."""
    from halfbyte.evaluate.simulation import simulate as run
    from halfbyte.report.tables import text_table

    _check_json(options.json, options.force)
    result = run(options)
    draw.finish()
    headers = ["simulation", "mean A bits", "ppl", "KLD", "KLD 99%", "same top"]
    table = [
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
    draw.say(text_table(headers, table))
    made = result.made_by
    draw.say(
        f"plan {made['plan']}, text {made['text']}, {result.rows[0].quality.tokens} tokens, seed {made['seed']}, "
        f"{made['device']}"
    )
    for row in result.rows:
        draw.say(f"\n[{row.name}] {row.sample}")
    return {"made_by": made, "rows": [asdict(row) for row in result.rows]}


def evaluate(options: EvalOptions, draw: Drawing) -> dict[str, Any]:
    """Perplexity, KL and top-1 of a model, plan or GGUF file on any text."""
    from halfbyte.evaluate.evaluate import evaluate as run
    from halfbyte.report.tables import text_table

    _check_json(options.json, options.force)
    result = run(options)
    draw.finish()
    keys = ("ppl", "ppl_reference", "kld_mean", "kld_p99", "top1_agreement", "tokens")
    draw.say(text_table(list(keys), [[result[key] for key in keys]]))
    draw.say(f"{result['evaluated']} in {result['engine']}, text {result['text']}")
    if result["tokenizers_agree"] is False:
        draw.say("note: llama.cpp and the tokenizer split this text differently; llama.cpp's tokens were scored")
    return result


def doctor(options: DoctorOptions, draw: Drawing) -> dict[str, Any]:
    """What this machine can do."""
    from halfbyte.report.doctor import as_dict, examine

    _check_json(options.json, options.force)
    if options.served is not None:
        return _doctor_served(options, draw)
    if options.twins is not None:
        raise HalfbyteError("twins of what?", where="--twins", fix="say --served DIR")
    findings = examine(options)
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        draw.say(f"{finding.topic:<{width}}  {finding.text}")
    return as_dict(findings)


def _doctor_served(options: DoctorOptions, draw: Drawing) -> dict[str, Any]:
    from halfbyte.core.device import resolve_device
    from halfbyte.report.tables import text_table
    from halfbyte.targets.served.report import block_rows, examine_served

    report = examine_served(
        str(options.served),
        device=resolve_device(options.device),
        hardware=options.hardware,
        engine=options.engine,
        twins=options.twins,
    )
    draw.say(f"{report.folder.path} on {report.hardware.name} ({report.hardware.key})")
    draw.say(f"{report.note}\n")
    draw.say(text_table(["the folder says → computed as", "layers"], [[*row] for row in report.counts.items()]))
    for reason in report.reasons:
        draw.say(f"  {reason}")
    headers, *rows = block_rows(report.layers)
    draw.say("\n" + text_table(headers, [[*row] for row in rows]))
    if report.folder.unquantised:
        draw.say(f"not quantised: {', '.join(report.folder.unquantised)}")
    for problem in report.folder.problems:
        draw.say(f"problem: {problem}")
    for way in report.ways:
        counts = "; ".join(f"{count} {what}" for what, count in way.counts.items())
        draw.say(f"\n{way.name}: {way.command}\n  {counts}")
    if report.engine == "vllm":
        draw.say(f"\ntensor parallel: {', '.join(map(str, report.tensor_parallel))} GPUs divide the layers evenly")
    if report.twins:
        draw.files(report.twins)
    else:
        draw.say(
            "to check: --twins TWINS writes copies with other activation bits; docs/serving.md says how to compare"
        )
    return report.to_dict()


def imatrix(options: ImatrixOptions, draw: Drawing) -> dict[str, Any]:
    """Measure an importance matrix for llama.cpp's tools."""
    from halfbyte.calibration.imatrix import make_imatrix

    _check_json(options.json, options.force)
    made = make_imatrix(options)
    draw.finish()
    draw.say(f"{len(made.values)} matrices, {made.tokens} tokens of {', '.join(made.texts)}")
    draw.files([Path(options.output)])
    return {"path": options.output, "matrices": len(made.values), "tokens": made.tokens, "texts": list(made.texts)}


ALIASES = {"export gguf": "export"}
COMMANDS: dict[str, tuple[type, Callable[[Any, Drawing], dict[str, Any]]]] = {
    "search": (SearchOptions, search),
    "export": (ExportOptions, export),
    "export vllm": (VllmExportOptions, export_vllm),
    "compare": (CompareOptions, compare),
    "simulate": (SimulateOptions, simulate),
    "eval": (EvalOptions, evaluate),
    "imatrix": (ImatrixOptions, imatrix),
    "doctor": (DoctorOptions, doctor),
}


def _check_json(path: str | None, force: bool) -> None:
    if path is not None:
        check_output(path, force=force)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> str:
    from halfbyte.core.environment import cores, cpu_name

    return f"{cpu_name()}, {cores()} cores"
