"""Export a plan as a folder that vLLM and transformers load, then check it: read back, and run in transformers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from transformers import AutoModelForCausalLM

from halfbyte.calibration.text import pydoc_text
from halfbyte.core.environment import available_memory
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_output_folder, check_space, mixed_folder, whole_folder, write_text
from halfbyte.core.progress import report
from halfbyte.evaluate.quality import windows_for
from halfbyte.models.estimate import estimate_load
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied
from halfbyte.options import VllmExportOptions
from halfbyte.plan import Codes, Plan, codes_path, load_codes, load_plan
from halfbyte.prepare.simulation import become_simulation_, load_for_plan, need_activations, plan_bits
from halfbyte.quant.quant_linear import set_activation_bits_, set_parameters_
from halfbyte.report.model_card import model_card
from halfbyte.targets.vllm_files.folder import (
    check_tensors,
    plan_tensors,
    schemes,
    write_config,
    write_tensors,
)

CHECK_TOKENS = 256
LARGEST_DIFFERENCE = 1e-4  # of logits in fp32, over the largest: both sides round to the same codes
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


def export_vllm(options: VllmExportOptions) -> VllmExportResult:
    """Write the plan as a compressed-tensors folder.

    Raises:
        HalfbyteError: anything the user can put right, or a check that failed; a folder appears once it is checked.
    """
    plan = load_plan(options.config)
    model_id = options.model_id or plan.model_id
    path = check_output_folder(options.output or mixed_folder(model_id), force=options.force)
    check_legal(plan, options.config)
    report("load model", 0, 1, model_id)
    source = load_for_plan(
        plan, options.model_id, device="cpu", dtype="stored", trust_remote_code=options.trust_remote_code, packed=True
    )
    codes = load_codes(codes_path(options.config))
    entries = plan_tensors(source, codes)
    nbytes = sum(entry.nbytes for entry in entries)
    check_space(path, nbytes + SMALL_FILES)
    groups = schemes(plan.layers)
    checked, difference, skipped = 0, None, "the check was skipped"
    with whole_folder(path) as folder:
        write_tensors(folder, entries, options.shard_size)
        write_text(folder / "README.md", model_card(plan, groups, source.family.blocks, nbytes, model_id))
        _write_tokenizer(folder, source)
        head = f"{source.family.head}.weight"
        write_config(folder, source, plan, tied=is_tied(source.model, source.family) and head not in codes.parameters)
        if options.check:
            check_tensors(folder, entries, codes)
            checked = len(entries)
            skipped = _too_large(source)
            if not skipped:
                difference = _compare(folder, source, codes, plan)
    counts = {group: len(names) for group, names in groups.items()}
    return VllmExportResult(path, counts, len(entries), nbytes, checked, difference, skipped, plan)


def check_legal(plan: Plan, where: object) -> None:
    """Refuse a plan that the format, or vLLM, cannot express.

    Raises:
        HalfbyteError: what is not legal, and the command that makes a legal plan.
    """
    need = {
        "symmetric activation codes": all(entry.a_symmetric for entry in plan.layers.values()),
        "4-bit codes of the whole range": all(entry.a4_clip == 1 for entry in plan.layers.values()),
        "folded transforms only, or R4 in blocks": all(
            not entry.rank and entry.rotated == bool(entry.rotation_block) for entry in plan.layers.values()
        ),
        "one choice per fused unit": plan.granularity == "fused",
        "positive scales that are bf16 numbers": plan.target == "vllm",
    }
    missing = [what for what, there in need.items() if not there]
    if missing:
        raise HalfbyteError(
            f"{where}: the plan was made for another target, expected vllm ({missing[0]}), got {plan.target}",
            fix=f"search again: halfbyte search --model_id {plan.model_id} --target vllm "
            f"--target_compression {plan.budget_asked:g} --output FILE",
        )
    need_activations(plan, where)


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


def _too_large(source: SourceModel) -> str:
    """Why the folder is not run in transformers, which decodes all of it to fp32; empty if there is memory enough."""
    cpu = torch.device("cpu")
    need = estimate_load(source.config, source.family, torch.float32, with_codes=True)
    outside = 4 * (need.parameters - need.linear_parameters)  # of our own side
    wanted, there = need.on(cpu) + outside, available_memory(cpu)
    return "" if wanted <= there else f"that takes {wanted / 1e9:.0f} GB of memory, and {there / 1e9:.0f} GB are free"


def _compare(folder: Path, source: SourceModel, codes: Codes, plan: Plan) -> float:
    """Largest difference of fp32 logits, transformers on ``folder`` against the simulation, over the largest logit.

    Raises:
        HalfbyteError: it is too large.
    """
    report("check logits", 0, 2, "transformers")
    window = torch.tensor([windows_for(source, pydoc_text(), CHECK_TOKENS, 1, where="check text")[0]])
    theirs = logits_in_transformers(folder, window)
    report("check logits", 1, 2, "simulation")
    become_simulation_(source, codes, plan.layers, packed=True)
    set_activation_bits_(source.model, plan_bits(plan))
    source.model.float()  # only now: its own weights, decoded, would not fit where the packed ones do
    set_parameters_(source.model, codes.parameters)  # with all their bits
    with torch.no_grad():
        ours = source.model(input_ids=window, use_cache=False).logits
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    report("check logits", 2, 2, f"largest difference {difference:.1g}")
    if not difference <= LARGEST_DIFFERENCE:
        raise HalfbyteError(
            f"{folder.name}: transformers does not agree with the simulation, "
            f"expected {LARGEST_DIFFERENCE:g}, got {difference:.3g}",
            fix="nothing was kept; report this as a bug",
        )
    return difference


def logits_in_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 logits ``[windows, length, vocabulary]`` of the folder in transformers, with its transforms applied."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    with _quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        if config["transform_config"]:
            apply_transform_config(model, TransformConfig(**config["transform_config"]))
        return model.eval()(input_ids=tokens, use_cache=False).logits


@contextmanager
def _quiet() -> Iterator[None]:
    """The library draws progress bars of its own, which would break ours."""
    with redirect_stderr(io.StringIO()):
        yield
