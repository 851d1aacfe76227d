"""The menu of ggml types: one for every matrix of a GGUF file, embedding and output head too; the budget is bytes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from halfbyte.calibration.imatrix import importance_for
from halfbyte.core.distributed import ALONE, Group, processes
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_space, sha256, whole_file
from halfbyte.core.progress import report
from halfbyte.menus import Menu, Model, Setting, Written
from halfbyte.models.estimate import MemoryEstimate, check_memory, estimate_load, estimate_types, fits
from halfbyte.models.layers import Outcome
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied, linear
from halfbyte.options import SearchOptions
from halfbyte.plan import Plan, types_path
from halfbyte.prepare.candidates import STAGE as ENCODE_STAGE
from halfbyte.prepare.candidates import (
    Candidates,
    TensorMenu,
    encode_candidates_,
    head_hessian,
    menus_of,
    part_files,
)
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.refine import STAGE as REFINE_STAGE
from halfbyte.prepare.refine import refine_types_
from halfbyte.prepare.screen import STAGE as TRY_STAGE
from halfbyte.prepare.screen import screened
from halfbyte.quant.ggml.encoded import Encoded, save_encoded
from halfbyte.quant.quant_linear import set_parameters_
from halfbyte.report.search_reports import TYPE_FRONT_REPORTS, TYPE_REPORTS, beside, write_type_reports
from halfbyte.search.problem import Genome, Problem, pruned
from halfbyte.search.run import REFINED, Found
from halfbyte.search.type_evaluator import MixedTypes, TypeEvaluator
from halfbyte.targets.gguf_files.size import budget_bytes_of, ftype_types, ftype_within
from halfbyte.transforms import TRANSFORMS
from halfbyte.workdir import Workdir

DEFAULT_FTYPE = "Q4_K_M"
FRONT_FTYPES = ("Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")  # llama.cpp's, whose sizes make a front
ENCODED_AS = 9.5  # forward passes that encoding takes as long as, per calibration token, ...
CANDIDATES_AS = 49_000.0  # ... and tokens of forward passes for what does not depend on the text
ROUNDED_AS = 2.0, 25_000.0  # the same for candidates that are rounded
REFINED_AS = 2.5, 16_000.0  # and for encoding the chosen types by GPTQ
TRIED_AS = 1.5  # the same for trying transforms, per token of calibration and search text
DECODED_AS = 1.7  # time of a genome whose matrices are decoded first, over that of the others
GROUP_SIZE = 32  # weights that share a scale in most types; for the choice of channel scales
TINY = 1e-12  # nats: no matrix is free


@dataclass(frozen=True)
class MatrixRow:
    """One row of the table of types.

    Attributes:
        matrix: module path.
        rows, columns: of the matrix.
        type: that was chosen.
        bytes: that it takes.
        kl_alone: predicted, nats per token, with all other matrices unquantised.
    """

    matrix: str
    rows: int
    columns: int
    type: str
    bytes: int
    kl_alone: float


class TypeMenu(Menu):
    """A ggml type for every matrix under a file size."""

    name, title, score_label = "types", "ggml types", "KL(reference ‖ quantised), nats per token"
    front_share: ClassVar[int] = 2

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        load = estimate_load(setting.origin.config, setting.origin.family, setting.dtype, packed=True)
        check_memory(load, torch.device("cpu"))

    def check(self, source: SourceModel) -> None:
        self.transforms, self.transforms_tried = self._asked_transforms(source), {}
        self.budget, self.menus = _budget(source, self.options)
        self.packed = _stays_packed(self.setting, self.budget)
        names = [menu.name for menu in self.menus]
        self.imatrix = importance_for(source, self.options.imatrix, names) if self.options.imatrix else {}

    def effort(self) -> dict[str, float]:
        calib = 1.0 * self.options.calib_tokens
        per_token, fixed = ROUNDED_AS if self._rounds else (ENCODED_AS, CANDIDATES_AS)
        work = {}
        if self.transforms is None:
            work[TRY_STAGE] = TRIED_AS * (calib + self.options.search_tokens) + CANDIDATES_AS / 7
        work[ENCODE_STAGE] = per_token * calib + fixed
        work |= self.search_effort(len(self.menus))
        work[f"search of {self.title}"] *= DECODED_AS
        if self._refines:
            work[REFINE_STAGE] = REFINED_AS[0] * calib + REFINED_AS[1]
        return work

    @property
    def losses_stage(self) -> str:
        return "KL of each matrix"

    def prepare(self, model: Model) -> None:
        source, device = model.source, self.setting.device
        references = model.reference.split(len(model.windows["search"]))
        if self.transforms is None:
            self.transforms = self._transforms_that_help(model)
        head = linear(source.model, source.family.head).weight  # that the reference was made with
        made = self._encoded(model)
        self.encoded = made.encoded
        self.menus = [_pruned(menu, made.errors[menu.name]) for menu in self.menus]
        self.mixed = MixedTypes(source.model, source.family, self.menus, made.encoded, device, packed=self.packed)
        self.on_search_text, self.on_validation_text = (
            TypeEvaluator(self.mixed, model.windows[part], answers, head=head)
            for part, answers in zip(("search", "valid"), references, strict=True)
        )
        smallest = model.workdir.value("matrix_losses", self._smallest_losses)
        losses = [
            _losses_by_error(menu, loss, made.errors[menu.name])
            for menu, loss in zip(self.menus, smallest, strict=True)
        ]
        self.problem = Problem(_costs(self.menus), tuple(losses), self.budget)
        self._source, self._tokens = source, model.tokens

    def release(self) -> None:
        super().release()
        del self.mixed, self._source  # they hold the model

    def to_refine(self, found: Found) -> dict[str, np.ndarray]:
        unseen = self.on_validation_text
        assert unseen is not None
        points = {"": found, **found.front} if self._refines else {}
        return {name: unseen.losses([point.genome])[0] for name, point in points.items()}

    @property
    def _refines(self) -> bool:
        """Whether matrices are encoded once more: by GPTQ, which looks at what the others do to their inputs."""
        return bool(self.options.refine) and self._recipe.quantiser.looks_at_inputs

    @property
    def _rounds(self) -> bool:
        """Whether candidates need no GPTQ: they are for choosing only. With ``--max_kl`` their KL has to be final."""
        return self._refines and not self.max_kl

    def refine(self, model: Model, found: Found, before: Mapping[str, np.ndarray]) -> Found:
        best, front = replace(found, front={}), {}
        refined = self._refine(model, best, "", before[""])
        for ftype, point in found.front.items():
            if point.genome == best.genome:
                front[ftype] = point.with_refinement(refined.refinement) if refined.refinement else point
                continue
            model = model.loaded_anew(self.setting)
            front[ftype] = self._refine(model, point, ftype, before[ftype])
        return replace(refined, front=front)

    def _refine(self, model: Model, found: Found, ftype: str, before: np.ndarray) -> Found:
        """The winner, or the point of a front that is named after ``ftype``, with what refining did to it."""
        types = {name: str(kind) for name, kind in found.choice.items()}
        path = _encoded_path(model.workdir, ftype, refined=True)

        def losses() -> np.ndarray | None:
            scorer = self._refined(model, types, path)
            return None if scorer is None else scorer.losses([(0,) * len(types)])[0]

        judged = self.judged(found, REFINED, before, losses, model.workdir, path)
        stay = "rounded weights" if self._rounds else "the search's weights"
        failed = f"too little memory on the device: {stay} stay"
        report(REFINE_STAGE, 1, 1, judged.refinement.said if judged and judged.refinement else failed)
        return judged or found

    def _refined(self, model: Model, types: Mapping[str, str], path: Path) -> TypeEvaluator | None:
        """Encode the mixture into ``path``; what measures it on the validation text, if memory was enough."""
        enough = True
        head = linear(model.source.model, model.source.family.head).weight  # that the reference was made with
        if processes().first and not path.exists():
            try:
                refine_types_(
                    model.source,
                    model.windows["calib"],
                    self._recipe,
                    types,
                    self.encoded,
                    path,
                    device=self.setting.exact_device,
                    hessian=head_hessian(model.workdir.candidates, self.setting.exact_device),
                    imatrix=self.imatrix,
                    keep_on=self._keep_on,
                )
            except torch.OutOfMemoryError:
                enough = False
        if not processes().from_first(enough):
            return None
        processes().send_file(path)
        encoded = Encoded()
        encoded.add(path)
        source = model.loaded_anew(self.setting).source
        set_parameters_(source.model, encoded.extra)
        menus = [replace(menu, types=(types[menu.name],)) for menu in self.menus]
        mixed = MixedTypes(source.model, source.family, menus, encoded, self.setting.device, packed=self.packed)
        answers = model.reference.split(len(model.windows["search"]))[1]
        return TypeEvaluator(mixed, model.windows["valid"], answers, head=head)

    def starts(self, problem: Problem) -> dict[str, Genome]:
        """The exact knapsack over the losses, and llama.cpp's own types of about that size."""
        ftype = _named_ftype(self.options) if problem.budget == self.budget else ""
        ftype = ftype or ftype_within(self._source, self.menus, problem.budget)
        theirs = self._no_larger(ftype_types(self._source, self.menus, ftype))
        return {"KL knapsack": problem.knapsack(), f"types of {ftype}": problem.fill(problem.repair(theirs))}

    def choice(self, genome: Genome) -> dict[str, int | str]:
        return {menu.name: menu.types[gene] for menu, gene in zip(self.menus, genome, strict=True)}

    def front_budgets(self) -> Sequence[tuple[str, int]]:
        """The sizes of llama.cpp's common file types that the menus reach."""
        smallest, largest = (sum(menu.nbytes(menu.types[end]) for menu in self.menus) for end in (0, -1))
        sizes = [
            (ftype, budget_bytes_of(self._source, self.menus, size="", bpw=0, ftype=ftype)) for ftype in FRONT_FTYPES
        ]
        return [(ftype, size) for ftype, size in sizes if size == self.budget or smallest < size < largest]

    def into_plan(self, plan: Plan, found: Found, workdir: Workdir) -> Plan:
        return self._plan_of(plan, found, self._saved(found, workdir, ""))

    def outcomes(self, plan: Plan, found: Found) -> list[Outcome]:
        return [Outcome(name, "a ggml type", str(kind)) for name, kind in found.choice.items()]

    @classmethod
    def output_paths(cls, output: Path, *, front: bool) -> list[Path]:
        paths = [types_path(output), *(beside(output, kind) for kind in TYPE_REPORTS)]
        if front:
            plans = [_point_path(output, ftype) for ftype in FRONT_FTYPES]
            paths += [*plans, *map(types_path, plans), *(beside(output, kind) for kind in TYPE_FRONT_REPORTS)]
        return paths

    def write(
        self,
        output: Path,
        plan: Plan,
        outcomes: Sequence[Outcome],
        found: Found,
        workdir: Workdir,
        reports: list[Path],
    ) -> Written:
        moved, plans = [(_encoded_path(workdir, "", refined=found.refined), types_path(output))], {}
        for ftype, point in found.front.items():
            path = _point_path(output, ftype)
            encoded = self._saved(point, workdir, ftype)
            bare = replace(
                plan, layers={}, codes_sha256="", search={}, transforms=(), budget_asked=1.0, budget_reached=1.0
            )
            plans[path] = self._plan_of(bare, point, encoded)
            moved.append((encoded, types_path(path)))
        rows = [asdict(row) for row in self._rows(found)]
        for written in write_type_reports(output, plan, rows, found):
            reports.append(written)
        return Written(moved, plans)

    def _rows(self, found: Found) -> list[MatrixRow]:
        return [
            MatrixRow(menu.name, menu.rows, menu.columns, kind, menu.nbytes(kind), losses[gene])
            for menu, losses, gene in zip(self.menus, self.problem.losses, found.genome, strict=True)
            for kind in (menu.types[gene],)
        ]

    def _plan_of(self, plan: Plan, found: Found, encoded: Path) -> Plan:
        record = {
            "transforms": list(self.transforms or ()),
            "capacity": found.budget,
            "nbytes": found.cost,
            **found.record(),
            "transforms_tried": self.transforms_tried,
            **self._tokens,
            "sha256": sha256(encoded),
        }
        return replace(plan, tensors={name: str(kind) for name, kind in found.choice.items()}, file=record)

    def _saved(self, found: Found, workdir: Workdir, ftype: str) -> Path:
        """The file of the encoded matrices of a mixture and of the parameters that transforms changed."""
        path = _encoded_path(workdir, ftype, refined=found.refined)
        if found.refined:
            if not path.exists():  # the point of the front that is the winner
                with whole_file(path) as partial:
                    shutil.copyfile(_encoded_path(workdir, "", refined=True), partial)
        else:
            rows = {(name, str(kind)): self.encoded.rows(name, str(kind)) for name, kind in found.choice.items()}
            save_encoded(path, rows, self.encoded.extra)
        return path

    def _asked_transforms(self, source: SourceModel) -> tuple[str, ...] | None:
        """What is folded before matrices are encoded; None: what helps.

        Raises:
            HalfbyteError: a transform that the model's file cannot hold.
        """
        if self.options.transforms == "auto":
            return None
        tied = is_tied(source.model, source.family)
        chosen = self.setting.target.transforms(self.options, tied=tied)
        if tied and any(TRANSFORMS[name].needs_untied_head for name in chosen):
            raise HalfbyteError(
                "--transforms: R1 would need a second vocabulary matrix in the file, expected smooth, r2 or none, got "
                "an output head that is tied to the embedding",
                fix="leave it out, or search with --spaces activations",
            )
        return chosen

    def _transforms_that_help(self, model: Model) -> tuple[str, ...]:
        bits = 8 * self.budget / sum(menu.rows * menu.columns for menu in self.menus)
        reference = model.reference.split(len(model.windows["search"]))[0]

        def try_them() -> dict[str, float]:
            return screened(
                model.source,
                model.windows["calib"],
                model.windows["search"],
                reference,
                self.menus,
                bits,
                self.options.weights,
                device=self.setting.exact_device,
                keep_on=self._keep_on,
            )

        self.transforms_tried = model.workdir.value("screen", try_them)
        best = min(self.transforms_tried, key=self.transforms_tried.__getitem__)
        return tuple(name for name in best.split(",") if name)

    @property
    def _keep_on(self) -> torch.device:
        """Where calibration activations are kept."""
        return torch.device("cpu") if self.packed else self.setting.exact_device

    @property
    def _recipe(self) -> Recipe:
        """What is folded, and how matrices are encoded."""
        return Recipe(self.transforms or (), self.options.weights, group_size=GROUP_SIZE, scale_bits=8)

    def _encoded(self, model: Model) -> Candidates:
        """Every matrix in every type of its menu, encoded into the work folder: by all processes, or by the first one
        where some of them do not see its folder."""
        folder, files = model.workdir.candidates, part_files(model.workdir.candidates, self.menus)
        there = sum(path.stat().st_size for path in files if path.exists())
        folder.mkdir(parents=True, exist_ok=True)  # of a process on another machine the first thing in its work folder
        check_space(folder, sum(menu.nbytes(kind) for menu in self.menus for kind in menu.types) - there)
        recipe, everyone = self._recipe, processes()
        together = all(everyone.merge([model.workdir.shared]))

        def encode(group: Group) -> Candidates:
            return encode_candidates_(
                model.source,
                model.windows["calib"],
                recipe,
                self.menus,
                folder,
                device=self.setting.exact_device,
                rounded=self._rounds,
                imatrix=self.imatrix,
                keep_on=self._keep_on,
                group=group,
            )

        if together:
            return encode(everyone)
        made = encode(ALONE) if everyone.first else None
        for path in files:
            everyone.send_file(path)
        return made or encode(ALONE)  # reads the files

    def _smallest_losses(self) -> list[float]:
        """KL of each matrix at its smallest type, all others unquantised.

        What the model in its dtype loses by folding alone is subtracted: in bf16 it would count in every matrix.
        """
        evaluator = self.on_search_text
        assert isinstance(evaluator, TypeEvaluator)
        found = [0.0] * len(self.menus)
        folding = evaluator.score(self.mixed.original)
        for done, (at, loss) in enumerate(evaluator.each_alone([0] * len(self.menus)), start=1):
            found[at] = loss - folding
            report(self.losses_stage, done, len(found), self.menus[at].name)
        return found

    def _no_larger(self, types: Mapping[str, str]) -> Genome:
        """A mixture in types on the menus that are no larger than these."""
        genome = []
        for menu in self.menus:
            wanted = menu.nbytes(types[menu.name])
            fitting = [gene for gene, kind in enumerate(menu.types) if menu.nbytes(kind) <= wanted]
            genome.append(fitting[-1] if fitting else 0)
        return tuple(genome)


def _budget(source: SourceModel, options: SearchOptions) -> tuple[int, list[TensorMenu]]:
    """Bytes that the matrices may take together, and the types to choose from.

    Raises:
        HalfbyteError: no mixture of types is that small.
    """
    menus = menus_of(source, mean_bits=4.5)
    ftype = _named_ftype(options)
    budget = budget_bytes_of(source, menus, size=options.size, bpw=options.bpw, ftype=ftype)
    menus = menus_of(source, 8 * budget / sum(menu.rows * menu.columns for menu in menus))
    smallest, largest = (sum(menu.nbytes(menu.types[end]) for menu in menus) for end in (0, -1))
    if budget < smallest:
        raise HalfbyteError(
            f"--size: the matrices do not fit, expected at least {smallest} bytes for them (all at their largest take "
            f"{largest}), got {budget}",
            fix="allow a larger file",
        )
    return budget, menus


def _named_ftype(options: SearchOptions) -> str:
    """llama.cpp's file type whose size is the budget; empty where bytes or bits are."""
    return options.ftype or ("" if options.size or options.bpw else DEFAULT_FTYPE)


def _stays_packed(setting: Setting, budget: int) -> bool:
    """Whether candidates stay encoded on the device.

    Raises:
        HalfbyteError: there is too little memory.
    """
    options, origin = setting.options, setting.origin
    tokens = options.calib_tokens, 2 * options.search_tokens

    def need(*, packed: bool) -> MemoryEstimate:
        return estimate_types(
            origin.config, origin.family, setting.dtype, tokens, options.ctx, nbytes=budget, packed=packed
        )

    packed = options.codes == "packed"
    if options.codes == "auto":
        packed = not fits(need(packed=False), setting.device)
    check_memory(need(packed=packed), setting.device)
    return packed


def _costs(menus: Sequence[TensorMenu]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(menu.nbytes(kind) for kind in menu.types) for menu in menus)


def _pruned(menu: TensorMenu, errors: Mapping[str, float]) -> TensorMenu:
    """Without types for which another one is no larger and no worse."""
    kept = pruned([menu.nbytes(kind) for kind in menu.types], [errors[kind] for kind in menu.types])
    return replace(menu, types=tuple(menu.types[at] for at in kept))


def _losses_by_error(menu: TensorMenu, smallest: float, errors: Mapping[str, float]) -> tuple[float, ...]:
    """What each type of a matrix adds to the KL: measured for the smallest, by output error for the others.

    KL is quadratic in a small error of one matrix, and so is the output error; the measured KL of a type that changes
    little would be noise.
    """
    found = [errors[kind] for kind in menu.types]
    largest = found[0] or 1.0  # a matrix of zeros has no errors
    return tuple(max(smallest, TINY) * error / largest for error in found)


def _encoded_path(workdir: Workdir, ftype: str, *, refined: bool) -> Path:
    """Where the encoded matrices of the winner, or of a point of a front, are until the plan stands."""
    return workdir.types("-".join(filter(None, ("refined" if refined else "", ftype))))


def _point_path(output: Path, ftype: str) -> Path:
    """Where the plan of one point of a front of types goes."""
    return output.with_name(f"{output.stem}.{ftype}{output.suffix}")


MENU = TypeMenu
