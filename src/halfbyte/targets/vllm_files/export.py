"""Export a plan as a folder for vLLM, then check it: read back, and run in what else reads the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halfbyte.arguments import parse_size
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import MANIFEST, check_space, mixed_folder, whole_folder, write_text
from halfbyte.core.guard import Touched, guarded, model_files
from halfbyte.core.progress import report
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied
from halfbyte.options import VllmExportOptions
from halfbyte.plan import Codes, Plan, codes_path, load_codes, load_plan, plan_files
from halfbyte.prepare.simulation import load_for_plan, need_activations
from halfbyte.report.model_card import model_card
from halfbyte.targets import Target
from halfbyte.targets.vllm_files.gpu import GPUTarget
from halfbyte.targets.vllm_files.tensors import check_tensors, plan_tensors, write_tensors

SMALL_FILES = 64 << 20  # bytes for tokenizer, configuration and card


@dataclass(frozen=True)
class VllmExportResult:
    """What an export leaves.

    Attributes:
        path: the folder.
        groups: config group -> how many layers.
        tensors, nbytes: how many tensors, and the bytes of their data.
        checked: tensors read back and compared; 0 if the check was skipped.
        difference: largest difference of logits, transformers against the simulation, over the largest logit; None if
            they were not compared.
        skipped: why not; empty if they were.
        plan: what was exported.
    """

    path: Path
    groups: dict[str, int]
    tensors: int
    nbytes: int
    checked: int
    difference: float | None
    skipped: str
    plan: Plan


def export_vllm(options: VllmExportOptions, on: Callable[[str, int], Target]) -> VllmExportResult:
    """Write the plan as a folder for the vLLM of its hardware.

    Args:
        on: (hardware, GPUs that share a layer) -> the target.

    Raises:
        HalfbyteError: anything the user can put right, or a check that failed; a folder appears once it is checked.
    """
    plan = load_plan(options.config)
    model_id = options.model_id or plan.model_id
    path = Path(options.output or mixed_folder(model_id))
    shard_bytes = parse_size(options.shard_size, "--shard_size")
    touched = Touched(inputs=[*plan_files(options.config), *model_files(model_id)], folder=path)
    with guarded(touched, json=options.json, force=options.force):
        return _exported(options, plan, path, target_of(plan, options.config, on), shard_bytes)


def _exported(
    options: VllmExportOptions, plan: Plan, path: Path, target: GPUTarget, shard_bytes: int
) -> VllmExportResult:
    model_id = options.model_id or plan.model_id
    report("load model", 0, 1, model_id)
    source = load_for_plan(
        plan, options.model_id, device="cpu", dtype="stored", trust_remote_code=options.trust_remote_code, packed=True
    )
    codes = load_codes(codes_path(options.config))
    entries = plan_tensors(source, codes, target.packing(source, plan, codes))
    nbytes = sum(entry.nbytes for entry in entries)
    check_space(path, nbytes + SMALL_FILES)
    groups: dict[str, int] = {}
    for entry in plan.layers.values():
        groups[target.group(entry)] = groups.get(target.group(entry), 0) + 1
    checked, difference, skipped = 0, None, "the check was skipped"
    with whole_folder(path) as folder:
        write_tensors(folder, entries, shard_bytes)
        write_text(
            folder / "README.md",
            model_card(plan, groups, target.how_to_run, target.tags, source.family.blocks, nbytes, model_id),
        )
        _write_tokenizer(folder, source)
        _write_config(folder, source, plan, codes, target)
        _write_manifest(folder, plan, target)
        if options.check:
            check_tensors(folder, entries, codes, target.packed_name, target.unpack)
            checked = len(entries)
            difference, skipped = target.compare(folder, source, plan, codes)
    return VllmExportResult(path, groups, len(entries), nbytes, checked, difference, skipped, plan)


def target_of(plan: Plan, where: object, on: Callable[[str, int], Target]) -> GPUTarget:
    """The target that the plan was made for.

    Raises:
        HalfbyteError: it was made for none of vLLM's, and the command that makes such a plan.
    """
    need_activations(plan, where)
    target = on(plan.hardware, 1) if plan.target == "vllm" and plan.hardware else None
    if not isinstance(target, GPUTarget):
        raise HalfbyteError(
            f"{where}: the plan was made for another target, expected vllm on a named GPU, got {plan.target}",
            fix=f"search again: halfbyte search --model_id {plan.model_id} --target vllm --hardware GPU --output FILE",
        )
    return target


def _write_manifest(folder: Path, plan: Plan, target: GPUTarget) -> None:
    """Write what halfbyte wants to know again, with the names of all files: such a folder may be replaced."""
    about = {
        "files": sorted(file.name for file in folder.iterdir()),
        "fingerprint": plan.fingerprint,
        "plan": plan.hash,
        "text_search": plan.text.get("search"),
        "vllm": target.engine,
        "emulated_below": target.emulated_below,
    }
    write_text(folder / MANIFEST, json.dumps(about))


def _write_config(folder: Path, source: SourceModel, plan: Plan, codes: Codes, target: GPUTarget) -> None:
    """Write ``config.json``: without it nothing loads the folder."""
    config = json.loads(source.config.to_json_string())
    config["architectures"] = config.get("architectures") or [type(source.model).__name__]
    untied = f"{source.family.head}.weight" in codes.parameters
    config["tie_word_embeddings"] = is_tied(source.model, source.family) and not untied
    config["quantization_config"] = target.quantization_config(source, plan)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True))


def _write_tokenizer(folder: Path, source: SourceModel) -> None:
    """Tokenizer, chat template and generation defaults.

    Raises:
        OSError: they cannot be written.
    """
    try:
        source.tokenizer.save_pretrained(folder)
    except Exception as error:
        if "os error" not in str(error):  # the tokenizers library raises bare exceptions
            raise
        raise OSError(28 if "os error 28" in str(error) else 5, str(error)) from error
    generation = getattr(source.model, "generation_config", None)
    if generation is not None:  # as text: saving it would refuse values that models are published with
        write_text(folder / "generation_config.json", generation.to_json_string(use_diff=True))
