"""The stages of a search as functions, each leaving a file that the next one, or ``--resume``, starts from.

load → reference → transforms, W4 codes, layer sensitivity → KL per unit → genetic search → validation → plan
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.allocation import Allocator
from halfbyte.calibration.gradients import output_gradient_power
from halfbyte.calibration.imatrix import importance_for
from halfbyte.calibration.text import Text, load_text, write_with
from halfbyte.calibration.windows import cut
from halfbyte.core.device import peak_memory, resolve_device, resolve_dtype
from halfbyte.core.distributed import ALONE, Group
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_output
from halfbyte.core.progress import report
from halfbyte.models.checkpoint import GivenCodes, QuantisedFolder
from halfbyte.models.estimate import check_memory, estimate_load
from halfbyte.models.loading import SourceModel, find, layers_of, load, units_of
from halfbyte.models.modules import is_tied, linear, move_
from halfbyte.options import SearchOptions
from halfbyte.plan import Layer, Outcome, Plan
from halfbyte.prepare.menus import TensorMenu
from halfbyte.prepare.recipe import TARGETS, Recipe, recipe_of
from halfbyte.prepare.walk import PREPARED, Prepared, load_prepared_, prepare_, save_prepared
from halfbyte.results import ActivationsFound, TypesFound, make_plan, output_paths, write_results
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.fitness import KLFitness, TableFitness, stages_of
from halfbyte.search.reference import Reference, reference
from halfbyte.search_checks import TARGET_CHECKS, check_search_options, memory_modes, spaces_of, types_packed
from halfbyte.type_search import TypeSearch, capacity, transforms_of
from halfbyte.workdir import RECORD, Stages, refuse_waiting, work_folder

FISHER_WINDOWS = 4  # for loss gradients


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves.

    Attributes:
        plan: the winners.
        activations, types: how they were found, in the spaces that were searched.
        outcomes: one row per layer and matrix, what was asked and what was done.
        files: everything written, in order.
        peak_memory: most bytes allocated on the device.
    """

    plan: Plan
    activations: ActivationsFound | None
    types: TypesFound | None
    outcomes: list[Outcome]
    files: list[Path]
    peak_memory: int


def search(options: SearchOptions, group: Group = ALONE) -> SearchResult:
    """Run the whole search and write the plan, its codes and its reports' data.

    Args:
        group: processes that run this together; the first one writes.

    Raises:
        HalfbyteError: anything the user can put right.
    """
    check_search_options(options)
    output, spaces = Path(options.output), spaces_of(options)
    if group.first:
        _check_outputs(options)
    device = _own_device(resolve_device(options.device), group)
    dtype = resolve_dtype(options.dtype, device)
    folder = QuantisedFolder(options.weights_from) if options.weights_from is not None and group.first else None
    origin = find(options.model_id, trust_remote_code=options.trust_remote_code)
    packed, gradients = memory_modes(options, origin, device, dtype) if "a4a8" in spaces else (False, False)
    if "ggml" in spaces:  # what it takes to search comes when the size of the candidates is known
        check_memory(estimate_load(origin.config, origin.family, dtype, packed=True), torch.device("cpu"))

    report("load model", 0, 1, options.model_id)
    source = load(origin, device=torch.device("cpu"), dtype=dtype)
    codes = None
    if folder is not None:
        codes = GivenCodes(folder, source, TARGETS[options.target].scale_rule)
    check_target = TARGET_CHECKS.get(options.target)
    if check_target:
        sizes = group.from_first(codes.group_sizes if codes is not None else {})
        check_target(source, layers_of(source.model, source.family), options, sizes)
    room, menus, given, on_rows = 0, [], {}, False
    if "ggml" in spaces:
        transforms_of(options, tied=is_tied(source.model, source.family))
        room, menus = capacity(source, options)
        on_rows = types_packed(options, origin, device, dtype, room)
    if options.imatrix:
        given = importance_for(source, options.imatrix, [menu.name for menu in menus])
    text, windows = _texts(source, options, device)
    counts = ", ".join(f"{part_windows.numel()} {part}_tokens" for part, part_windows in windows.items())
    report("load model", 1, 1, f"text {text.name}: {counts}")
    settings = _settings(options, source, text, device, codes)
    with Stages(output, settings, resume=options.resume, group=group) as stages:
        judged, known = torch.cat([windows["search"], windows["valid"]]), None
        if "ggml" in spaces or options.fitness == "kl":
            known = reference(source.model, source.family, judged, device=device)
        run = Run(options, source, windows, known, stages, device, group, codes)
        activations = _search_activations(run, packed=packed, gradients=gradients) if "a4a8" in spaces else None
        types = None
        if "ggml" in spaces:
            if activations is not None:
                run = replace(run, source=load(origin, device=torch.device("cpu"), dtype=dtype))
            types = _search_types(run, room, menus, given, packed=on_rows)
        written = None
        if group.first:
            plan, outcomes = make_plan(options, source, activations, types, text.record(), stages)
            written = plan, outcomes, write_results(output, plan, outcomes, activations, types, stages)
        plan, outcomes, files = group.from_first(written)  # pyright: ignore[reportGeneralTypeIssues]
    return SearchResult(plan, activations, types, outcomes, files, peak_memory(device))


@dataclass(frozen=True)
class Run:
    """What all searches of one command share.

    Attributes:
        source: the model, unquantised, on the host.
        windows: ``calib``, ``search`` and ``valid`` text, int64 ``[windows, length]``.
        known: the unquantised model's answers on search and validation text.
        codes: of a checkpoint, in the process that prepares the model.
    """

    options: SearchOptions
    source: SourceModel
    windows: Mapping[str, torch.Tensor]
    known: Reference | None
    stages: Stages
    device: torch.device
    group: Group
    codes: GivenCodes | None = None

    @property
    def used(self) -> dict[str, int]:
        """Tokens of each part."""
        return {f"{part}_tokens": windows.numel() for part, windows in self.windows.items()}


def _search_activations(run: Run, *, packed: bool, gradients: bool) -> ActivationsFound:
    """W4 codes, and activation bits for every unit under the budget."""
    options, source, windows, device = run.options, run.source, run.windows, run.device
    recipe = recipe_of(options, tied=is_tied(source.model, source.family))
    layers = layers_of(source.model, source.family)
    units = units_of(layers, source.family, options.granularity)
    known = run.known
    if known is not None:
        for transform in recipe.applied:
            known = transform.reference(known, source.model, source.family)
    head = linear(source.model, source.family.head).weight
    prepared = _prepare(run, recipe, packed=packed)
    preparation_memory = peak_memory(device)
    move_(source.model, source.family, device, without_embedding=packed and not gradients)
    if known is not None and options.weights_from is not None and _head_changed(prepared, source):
        known = known.for_head(head.to(device), linear(source.model, source.family.head).weight)
    if gradients:
        _measure_gradients_(prepared, source, layers, windows["calib"], run.stages)
    if known is None or options.fitness != "kl":
        fitness, judge = TableFitness(units, prepared.sensitivity, options.fitness), None
    else:
        parts = zip((windows["search"], windows["valid"]), known.split(len(windows["search"])), strict=True)
        evaluator, judge = (
            KLEvaluator(source.model, source.family, units, tokens, answers, group=run.group)
            for tokens, answers in parts
        )
        fitness = KLFitness(evaluator, stages_of(evaluator.windows))
    allocator = Allocator(units, fitness, judge, prepared.sensitivity, options, run.stages, run.group)
    found = allocator.best(options.target_compression, options.ga_gen)
    taken = {"weights_from": run.codes.record()} if run.codes is not None else {}
    found = replace(found, about={**run.used, **taken, **found.about})
    front = allocator.front() if options.pareto else []
    return ActivationsFound(recipe.transforms, units, prepared, found, front, preparation_memory)


def _head_changed(prepared: Prepared, source: SourceModel) -> bool:
    return f"{source.family.head}.weight" in prepared.codes.parameters


def _search_types(
    run: Run, room: int, menus: Sequence[TensorMenu], given: Mapping[str, torch.Tensor], *, packed: bool
) -> TypesFound:
    """A ggml type for every matrix under the size."""
    assert run.known is not None
    known = run.known.split(len(run.windows["search"]))
    stages = (run.stages, run.device, run.group)
    found = TypeSearch(run.source, run.windows, known, room, menus, given, run.options, *stages, packed=packed)
    best = found.best(room, run.options.ga_gen)
    front = found.front(best) if run.options.pareto else {}
    if run.group.first:
        for like, one in {"": best, **front}.items():
            found.save(one, like)
    return replace(best, front=front, about={**run.used, **best.about})


def _check_outputs(options: SearchOptions) -> None:
    """Refuse to overwrite what was not given up."""
    output = check_output(options.output, force=options.force)
    unfinished = options.resume and (work_folder(output) / RECORD).exists()
    for path in output_paths(output, spaces_of(options), front=options.pareto):
        check_output(path, force=options.force or unfinished)
    if not options.resume and not options.force:
        refuse_waiting(output)


def _exact(device: torch.device) -> torch.device:
    """Where to prepare: MPS has neither fp64 nor the factorisations of GPTQ."""
    return torch.device("cpu") if device.type == "mps" else device


def _own_device(device: torch.device, group: Group) -> torch.device:
    """This process's GPU, where several processes share a machine."""
    if device.type != "cuda" or group.size == 1:
        return device
    if group.local_rank >= torch.cuda.device_count():
        raise HalfbyteError(
            "more processes than GPUs",
            where="torchrun --nproc-per-node",
            expected=torch.cuda.device_count(),
            got=f"process {group.local_rank} on this machine",
        )
    own = torch.device("cuda", group.local_rank)
    torch.cuda.set_device(own)
    return own


def _texts(source: SourceModel, options: SearchOptions, device: torch.device) -> tuple[Text, dict[str, torch.Tensor]]:
    """The text, and the windows ``[windows, length]`` of its parts ``calib``, ``search`` and ``valid``."""

    def written_by_model() -> str:
        check_memory(estimate_load(source.config, source.family, source.dtype), device)  # all of it, decoded
        source.model.to(device)
        text = write_with(source.model, source.tokenizer, seed=options.seed)
        source.model.to("cpu")
        return text

    text = load_text(options.calib, written_by_model=written_by_model)
    found = {}
    for part, tokens in (
        ("calib", options.calib_tokens),
        ("search", options.search_tokens),
        ("valid", options.search_tokens),
    ):
        ids = source.tokenizer(text.parts[part], add_special_tokens=False).input_ids
        length = min(options.ctx, tokens)
        windows = cut(ids, length, max(1, tokens // length), spread=True, where=f"{text.name} ({part} part)")
        found[part] = torch.tensor(windows)
    return text, found


def _settings(
    options: SearchOptions, source: SourceModel, text: Text, device: torch.device, codes: GivenCodes | None
) -> dict[str, Any]:
    ignored = ("resume", "force", "json", "output", "device", "trust_remote_code")
    settings = {key: value for key, value in asdict(options).items() if key not in ignored}
    taken = {"weights_from": codes.folder.digest} if codes is not None else {}
    return {**settings, **taken, "device": device.type, "fingerprint": source.fingerprint, "text": text.record()}


def _prepare(run: Run, recipe: Recipe, *, packed: bool) -> Prepared:
    """The W4 simulation: made by the first process, or read from where an interrupted run left it."""
    made, source, stages, device = None, run.source, run.stages, run.device
    if run.group.first:
        made = load_prepared_(source, stages, recipe, device=device, packed=packed) if stages.resumed else None
        if made is None:
            calib, where = run.windows["calib"], _exact(device)
            made = prepare_(source, calib, recipe, device=where, packed=packed, checkpoint=run.codes)
            save_prepared(stages, made)
    for path in (stages.codes, stages.folder / PREPARED):
        run.group.send_file(path)
    made = made or load_prepared_(source, stages, recipe, device=device, packed=packed)
    assert made is not None
    return made


def _measure_gradients_(
    prepared: Prepared, source: SourceModel, layers: list[Layer], tokens: torch.Tensor, stages: Stages
) -> None:
    """Add the loss gradients at the W4 simulation's outputs, which transforms have scaled, to the sensitivity."""
    windows = tokens[:FISHER_WINDOWS]

    def measure() -> dict[str, float]:
        power: dict[str, float] = {}
        for done, power in enumerate(output_gradient_power(source.model, layers, windows), start=1):  # noqa: B007
            report("loss gradients", done, len(windows), f"window {done}")
        return power

    power = stages.value("gradients", measure)
    for name, row in prepared.sensitivity.items():
        prepared.sensitivity[name] = replace(row, grad_power=power[name])
