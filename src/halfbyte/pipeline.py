"""A search, from the options to the plan on disk.

load → reference → for each menu of the target: prepare → losses of single units → search → validate → refine → plan
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.arguments import parse_size
from halfbyte.calibration.text import Text, cut, load_text, text_files, write_with
from halfbyte.core.distributed import processes
from halfbyte.core.environment import device_name, limit_memory, resolve_device, resolve_dtype
from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.guard import Touched, guarded, model_files
from halfbyte.core.language import ENGLISH, speaking
from halfbyte.core.progress import report, warn
from halfbyte.core.stages import Stage, Stages, watched
from halfbyte.menus import Menu, Model, Setting, check_options, menus_of, weights_of
from halfbyte.models.checkpoint import CheckpointCodes, QuantisedFolder
from halfbyte.models.estimate import check_memory, estimate_load, with_tokens
from halfbyte.models.layers import Outcome, layers_of
from halfbyte.models.loading import SourceModel, find, load, made_with
from halfbyte.options import SearchOptions
from halfbyte.plan import Plan, save_plan
from halfbyte.prepare.tune import BATCH_TOKENS
from halfbyte.report.page import PAGE, Kept, Made, write_page
from halfbyte.report.search_reports import beside
from halfbyte.search.reference import reference
from halfbyte.search.run import Found
from halfbyte.targets import TARGETS, Target
from halfbyte.workdir import RECORD, Workdir, refuse_waiting, remove_if_done, work_folder

TUNE_TOKENS = 1 << 17  # of text at most: 2 GB of a 7B's answers
WINDOWS = 2  # that a text is cut into at least: a search looks at part of them first


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves.

    Attributes:
        plan: the winners.
        found: name of a menu (``activations``, ``types``) -> how its part of the plan was found.
        outcomes: one row per layer and matrix, what was asked and what was done.
        files: everything written, the plan first.
        stages: what each stage took.
        peak_memory: most bytes allocated on the device.
    """

    plan: Plan
    found: Mapping[str, Found]
    outcomes: Sequence[Outcome]
    files: Sequence[Path]
    stages: Mapping[str, Stage]
    peak_memory: int


def search(options: SearchOptions) -> SearchResult:
    """Search a plan, and write it with its codes and its reports.

    Several processes that :func:`halfbyte.core.distributed.joined` has brought together share the work; the first one
    writes.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    target = TARGETS.find(options.target, where="--target").on(options.hardware, options.tensor_parallel)
    check_options(options, target)
    device = _own_device(resolve_device(options.device))
    if options.device_memory:
        limit_memory(device, parse_size(options.device_memory, "--device_memory"))
    options = with_tokens(options, device)
    kinds = menus_of(options, target)
    with watched(device) as stages:
        if not processes().first:
            return _searched(options, target, kinds, device, stages)
        if not options.force:
            (remove_if_done if options.resume else refuse_waiting)(Path(options.output))
        with guarded(_touched(options, list(kinds.values())), json=options.json, force=options.force):
            return _searched(options, target, kinds, device, stages)


def _searched(
    options: SearchOptions,
    target: Target,
    kinds: Mapping[str, Callable[[Setting], Menu]],
    device: torch.device,
    stages: Stages,
) -> SearchResult:
    output = Path(options.output)
    dtype = resolve_dtype(options.dtype, device)
    origin = find(options.model_id, trust_remote_code=options.trust_remote_code)
    setting = Setting(options, target, origin, device, dtype)
    menus = {name: make(setting) for name, make in kinds.items()}

    report("load model", 0, 1, options.model_id)
    source = load(origin, device=torch.device("cpu"), dtype=dtype)
    checkpoint = _checkpoint(setting, source)
    group_sizes = processes().from_first({} if checkpoint is None else checkpoint.group_sizes)
    target.check_model(source, layers_of(source.model, source.family), options, group_sizes)
    for menu in menus.values():
        menu.check(source)
    text, windows = _texts(setting, source)
    counts = ", ".join(f"{tokens.numel()} {part}_tokens" for part, tokens in windows.items())
    report("load model", 1, 1, f"text {text.name}: {counts}")

    source.model.to(setting.home)
    with Workdir(output, _settings(setting, source, text, checkpoint), resume=options.resume) as workdir:
        scored = torch.cat([windows["search"], windows["valid"]])
        started = time.monotonic()
        answers = reference(source.model, source.family, scored, device=device)
        report("reference", 1, 1, f"{scored.numel()} tokens")
        if device.type == "cpu":
            per_token = (time.monotonic() - started) / scored.numel()
            _foretell(per_token, list(menus.values()), workdir, once=not options.pareto)
        model = Model(source, windows, answers, workdir, checkpoint)
        plan = Plan(
            model_id=options.model_id,
            fingerprint=source.fingerprint,
            target=target.name,
            hardware=target.hardware,
            granularity=options.granularity,
            layers={},
            budget_asked=1.0,  # what llama.cpp computes with, where no activation bits are searched
            budget_reached=1.0,
            weights=weights_of(options),
            text=text.record(),
            seed=options.seed,
            versions={**made_with(source), "device": device_name(device)},  # the model itself is not there yet
        )
        del source  # each menu changes the model that it gets; only one is in memory at a time
        found: dict[str, Found] = {}
        for at, (name, menu) in enumerate(menus.items()):
            if at > 0:
                model = model.loaded_anew(setting)
            menu.prepare(model)
            found[name] = menu.search(workdir)
            losses = menu.to_refine(found[name])
            menu.release()
            if losses:
                model = model.loaded_anew(setting)
                found[name] = menu.refine(model, found[name], losses)
        written = None
        if processes().first:
            written = _write(output, plan, menus, found, workdir, stages.stages)
        plan, outcomes, files = processes().from_first(written)  # pyright: ignore[reportGeneralTypeIssues]
    return SearchResult(plan, found, outcomes, files, stages.stages, stages.peak_memory)


def _foretell(seconds_per_token: float, menus: Sequence[Menu], workdir: Workdir, *, once: bool) -> None:
    """Say how long the search will take, from how long the reference took.

    Args:
        once: each stage is run once; otherwise nobody knows how much of the whole is done.
    """
    expected: dict[str, float] = {}
    for menu in menus:
        for stage, tokens in menu.effort().items():
            expected[stage] = expected.get(stage, 0.0) + tokens * seconds_per_token
    minutes = sum(expected.values()) / 60
    parts = ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in expected.items())
    less = "; less, since an interrupted search goes on" if workdir.resumed else ""
    report("time", 1, 1, f"about {max(1.0, minutes):.0f} minutes from here ({parts}{less})", expected if once else None)


def _write(
    output: Path,
    plan: Plan,
    menus: Mapping[str, Menu],
    found: Mapping[str, Found],
    workdir: Workdir,
    stages: dict[str, Stage],
) -> tuple[Plan, list[Outcome], list[Path]]:
    """Write the reports, then codes and encoded matrices, then the plan, so that a plan that exists is complete."""
    outcomes: list[Outcome] = []
    for name, menu in menus.items():
        plan = menu.into_plan(plan, found[name], workdir)
        outcomes += menu.outcomes(plan, found[name])
    reports: list[Path] = []
    moved: list[tuple[Path, Path]] = []
    plans: dict[Path, Plan] = {output: plan}
    saved: list[Path] = []
    try:
        for name, menu in menus.items():
            with speaking(ENGLISH):  # pictures as PNG, whose font has no other letters
                written = menu.write(output, plan, outcomes, found[name], workdir, reports)
            moved += written.moved
            plans |= written.plans
        report("write", 1, 1, f"{len(reports)} reports")
        for here, there in moved:
            here.replace(there)
        for path, one in reversed(plans.items()):
            save_plan(path, one)
            saved.append(path)
    except BaseException:  # Ctrl-C too: a resumed run starts from here, and nothing speaks of a plan that is not there
        for here, there in moved:
            if not here.exists():
                there.replace(here)
        for path in (*saved, *reports):
            path.unlink()
        raise
    files = [*plans, *(there for _, there in moved), *reports]
    try:
        kept = Kept(plans={plan.hash: Made(stages, resumed=workdir.resumed)})
        files.append(write_page(beside(output, PAGE), [output], kept))
    except Exception as error:  # noqa: BLE001 - a page that cannot be drawn takes no plan away
        beside(output, PAGE).unlink(missing_ok=True)  # of the plan that was there before
        warn(f"the page was not written, {first_line(error)}; halfbyte report makes it")
    return plan, outcomes, files


def _checkpoint(setting: Setting, source: SourceModel) -> CheckpointCodes | None:
    """The codes of ``--weights_from``, checked; in the first process only."""
    options = setting.options
    if options.weights_from is None or not processes().first:
        return None
    folder = QuantisedFolder(options.weights_from)
    return CheckpointCodes(folder, source, setting.recipe.scale_rule)


def _touched(options: SearchOptions, kinds: Sequence[type[Menu]]) -> Touched:
    """What the search reads and writes."""
    output = Path(options.output)
    others = [path for kind in kinds for path in kind.output_paths(output, front=options.pareto)]
    others.append(beside(output, PAGE))
    unfinished = options.resume and (work_folder(output) / RECORD).exists()
    return Touched(
        inputs=[
            *model_files(options.model_id),
            *text_files(options.calib),
            *filter(None, (options.weights_from, options.imatrix)),
        ],
        outputs=[output, *others],
        kept=others if unfinished else [],
        work=work_folder(output),
    )


def _own_device(device: torch.device) -> torch.device:
    """This process's GPU, where several processes share a machine."""
    group = processes()
    if device.type != "cuda" or group.size == 1:
        return device
    if group.local_rank >= torch.cuda.device_count():
        raise HalfbyteError(
            f"torchrun --nproc-per-node: more processes than GPUs, expected {torch.cuda.device_count()}, "
            f"got process {group.local_rank} on this machine"
        )
    own = torch.device("cuda", group.local_rank)
    torch.cuda.set_device(own)
    return own


def _texts(setting: Setting, source: SourceModel) -> tuple[Text, dict[str, torch.Tensor]]:
    """The text, and the windows ``[windows, length]`` of its parts ``calib``, ``search``, ``valid`` and ``tune``.

    To tune on, there is more of the calibration text.
    """
    options = setting.options

    def written_by_model() -> str:
        check_memory(estimate_load(source.config, source.family, source.dtype), setting.device)  # all of it, decoded
        source.model.to(setting.device)
        text = write_with(source.model, source.tokenizer, seed=options.seed)
        source.model.to("cpu")
        return text

    text = load_text(options.calib, written_by_model=written_by_model)
    if text.note:
        warn(text.note)
    wanted = {"calib": options.calib_tokens, "search": options.search_tokens, "valid": options.search_tokens}
    if options.tune:
        wanted["tune"] = min(options.tune * BATCH_TOKENS, TUNE_TOKENS)  # what there is of it
    found = {}
    for part, tokens in wanted.items():
        ids = source.tokenizer(text.parts["calib" if part == "tune" else part], add_special_tokens=False).input_ids
        length = min(options.ctx, max(1, tokens // WINDOWS))
        windows = cut(ids, length, max(1, tokens // length), spread=True, where=f"{text.name} ({part} part)")
        found[part] = torch.tensor(windows)
    return text, found


def _settings(setting: Setting, source: SourceModel, text: Text, checkpoint: CheckpointCodes | None) -> dict[str, Any]:
    """What a resumed search must have in common with the interrupted one."""
    ignored = ("resume", "force", "json", "output", "device", "device_memory", "trust_remote_code", "verbose", "lang")
    settings = {key: value for key, value in asdict(setting.options).items() if key not in ignored}
    taken = {} if checkpoint is None else {"weights_from": checkpoint.folder.digest}
    run = {"device": setting.device.type, "fingerprint": source.fingerprint, "text": text.record()}
    return {**settings, **taken, **run}
