"""What a search chooses from: activation bits for every unit, or a ggml type for every matrix. One file each.

Here is what every menu has in common: made from options, checked against a model, prepared, searched, written. And
which menus a search has, and what it refuses before any work.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from halfbyte.core.environment import available_memory
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import home_expanded
from halfbyte.core.registry import Registry
from halfbyte.models.checkpoint import CheckpointCodes
from halfbyte.models.estimate import estimate_load, estimate_search
from halfbyte.models.layers import Outcome
from halfbyte.models.loading import Origin, SourceModel, load
from halfbyte.options import SearchOptions
from halfbyte.plan import Plan, check_suffix
from halfbyte.prepare.recipe import Recipe
from halfbyte.search.genetic import GeneticSettings
from halfbyte.search.reference import Reference
from halfbyte.search.run import Found, Refinement, Searchable, search_menu
from halfbyte.targets import Target
from halfbyte.workdir import Workdir

HOME_ROOM = 4  # unquantised models that a device must have room for, to keep the one that waits
ROUNDED = 0.9  # time of a candidate per token over that of the reference, whose head is multiplied twice
ELITE = 2  # genomes of a generation that are known already
LIKELY = 0.8  # of the generations that were asked for: most searches find nothing better before the last
SHARE = 0.85  # of the search text, for a genome
BUDGET_STEPS = 64  # between the cheapest and the dearest choice, where --max_kl looks for a budget
VALIDATED = 14  # genomes that are measured on the validation text
OTHER_NAMES = {"a4a8": "activations", "ggml": "types"}  # of menus, in older commands


@dataclass(frozen=True)
class Setting:
    """What is known before a model is loaded.

    Attributes:
        options: of the command.
        target: where the plan will run.
        origin: the model, not read yet.
        device, dtype: where and in what it will run.
    """

    options: SearchOptions
    target: Target
    origin: Origin
    device: torch.device
    dtype: torch.dtype

    @property
    def recipe(self) -> Recipe:
        """What preparation has to do, apart from transforms."""
        return self.target.recipe_for(self.options)

    @property
    def home(self) -> torch.device:
        """Where an unquantised model waits: in main memory, or on a GPU with room for it and all else."""
        cpu = torch.device("cpu")
        if self.device.type != "cuda" or self.options.codes == "packed":
            return cpu
        model, tokens = (self.origin.config, self.origin.family, self.dtype), self.options.calib_tokens
        size = estimate_load(*model).device
        need = max(HOME_ROOM * size, size + estimate_search(*model, tokens, self.options.ctx).preparation)
        return self.device if need < available_memory(self.device) else cpu

    @property
    def exact_device(self) -> torch.device:
        """Where to prepare: MPS has neither fp64 nor the factorisations of GPTQ."""
        return torch.device("cpu") if self.device.type == "mps" else self.device


@dataclass(frozen=True)
class Model:
    """What all menus of one command share.

    Attributes:
        source: the model, unquantised, where :attr:`Setting.home` says.
        windows: ``calib``, ``search`` and ``valid`` text, and ``tune`` if asked for, int64 ``[windows, length]``.
        reference: the unquantised model's answers on search and validation text.
        workdir: where intermediate results are kept.
        checkpoint: whose codes are taken over, in the process that prepares the model.
    """

    source: SourceModel
    windows: Mapping[str, torch.Tensor]
    reference: Reference
    workdir: Workdir
    checkpoint: CheckpointCodes | None = None

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each part of the text, for the plan."""
        return {f"{part}_tokens": windows.numel() for part, windows in self.windows.items()}

    def loaded_anew(self, setting: Setting) -> Model:
        """The same with the model as it is in its files: preparation changes it in place."""
        return replace(self, source=load(setting.origin, device=setting.home, dtype=setting.dtype))


class Menu(Searchable):
    """One problem of a search: its units, the formats that each may have, and what a choice of them costs and loses.

    Used in this order: made from the options, :meth:`check`, :meth:`prepare`, :meth:`search`, :meth:`to_refine`,
    :meth:`release`, :meth:`refine`, then the plan and files.

    Args:
        setting: options, target, model that is not read yet.

    Raises:
        HalfbyteError: there is too little memory.
    """

    front_share: ClassVar[int] = 5  # of the generations, for each budget of a front

    def __init__(self, setting: Setting) -> None:
        self.setting, self.options = setting, setting.options

    @abstractmethod
    def check(self, source: SourceModel) -> None:
        """Refuse, before any work, what this menu cannot do with the model.

        Raises:
            HalfbyteError: anything the user can put right.
        """

    @property
    @abstractmethod
    def losses_stage(self) -> str:
        """What progress calls the losses of single units."""

    @abstractmethod
    def prepare(self, model: Model) -> None:
        """The long work: candidates for every unit, and what each format loses alone. Changes ``model.source``."""

    @abstractmethod
    def effort(self) -> dict[str, float]:
        """What is to be done, stage -> tokens of whole forward passes that take as long; known after :meth:`check`.

        Stages are in their order, and called as in progress.
        """

    def search_effort(self, units: int) -> dict[str, float]:
        """:meth:`effort` of what every menu does when it is prepared.

        Each unit is measured through half of the blocks on average, a genome on part of the text if it cannot win.
        """
        options = self.options
        genomes = options.ga_pop + LIKELY * options.ga_gen * max(1, options.ga_pop - ELITE)
        return {
            self.losses_stage: ROUNDED * 0.5 * units * options.search_tokens,
            f"search of {self.title}": ROUNDED * SHARE * genomes * options.search_tokens,
            f"validation of {self.title}": ROUNDED * VALIDATED * options.search_tokens,
        }

    @property
    def max_kl(self) -> float:
        """``--max_kl`` for the last menu of the search, which is what is exported; 0 for others: a budget holds."""
        last = list(menus_of(self.options, self.setting.target))[-1]
        return self.options.max_kl if self.name == last else 0.0

    @abstractmethod
    def front_budgets(self) -> Sequence[tuple[str, int]]:
        """(name, budget) of the points of a front."""

    def search(self, workdir: Workdir) -> Found:
        """The best choice under the budget, and if asked for those of a front of budgets."""
        options = self.options
        settings = GeneticSettings(population=max(2, options.ga_pop), generations=options.ga_gen)
        if self.max_kl:
            self.problem = self.problem.with_budget(self._cheapest_budget(self.max_kl))

        def run(settings: GeneticSettings, name: str, budget: int | None = None) -> Found:
            return search_menu(
                self,
                settings,
                seed=options.seed,
                state_file=workdir.folder / f"genetic-{self.name}{name}.json",
                resume=workdir.resumed,
                budget=budget,
                at_most=self.max_kl,
            )

        best = run(settings, "")
        if not options.pareto:
            return best
        shorter = replace(settings, generations=max(1, options.ga_gen // self.front_share))
        front = {
            name: best if budget == best.budget else run(shorter, f"-{name}", budget)
            for name, budget in self.front_budgets()
        }
        return replace(best, front=front)

    def _cheapest_budget(self, max_kl: float) -> int:
        """The smallest budget, to a 64th of the range, whose knapsack has at most that KL on the validation text.

        Raises:
            HalfbyteError: the dearest choice has more.
        """
        problem, unseen = self.problem, self.on_validation_text
        assert unseen is not None  # check_options wants the whole model's KL
        least, most = problem.spent(problem.cheapest), problem.spent(problem.dearest)
        reached = unseen.score(problem.dearest)
        if reached > max_kl:
            raise HalfbyteError(
                f"--max_kl: no choice of {self.title} reaches it, expected at least {reached:.3g}, got {max_kl:g}",
                fix="allow more, or choose other --transforms or --weights",
            )
        low, high = -1, BUDGET_STEPS  # the first fails, the second does not
        while high - low > 1:
            middle = (low + high) // 2
            budget = least + (most - least) * middle // BUDGET_STEPS
            if unseen.score(problem.with_budget(budget).knapsack()) <= max_kl:
                high = middle
            else:
                low = middle
        return least + (most - least) * high // BUDGET_STEPS

    def to_refine(self, found: Found) -> dict[str, np.ndarray]:
        """What is to be refined -> its losses on the validation text, ``[windows, segments]``.

        The winner's name is empty, points of a front have their budget's.
        """
        return {}  # of a menu whose weights do not depend on what is chosen

    def refine(self, model: Model, found: Found, before: Mapping[str, np.ndarray]) -> Found:
        """Make weights once more, for the formats that were chosen; kept if that loses less.

        Args:
            model: as it is in its files; it is changed.
            before: from :meth:`to_refine`; the model that was searched has been released since.
        """
        return found

    def judged(
        self,
        found: Found,
        what: str,
        before: np.ndarray,
        losses: Callable[[], np.ndarray | None],
        workdir: Workdir,
        file: Path,
    ) -> Found | None:
        """``found`` with what was done to its weights, kept or not; None if it could not be done. Measured once.

        Args:
            what: :data:`halfbyte.search.run.REFINED` or ``TUNED``.
            before: losses on the validation text, ``[windows, segments]``.
            losses: makes the weights and measures the same of them; None if there are none.
            file: of the work folder, where the weights are.
        """

        def measure() -> dict[str, object] | None:
            after = losses()
            return None if after is None else asdict(Refinement.between(what, before, after))

        measured = workdir.value(file.stem, measure, of=file)
        return None if measured is None else found.with_refinement(Refinement(**measured))

    def release(self) -> None:
        """Let go of the model once :meth:`search` is over, so that another menu has room for its own."""
        self.on_search_text = self.on_validation_text = None

    @abstractmethod
    def into_plan(self, plan: Plan, found: Found, workdir: Workdir) -> Plan:
        """The plan with what this menu decided."""

    @abstractmethod
    def outcomes(self, plan: Plan, found: Found) -> list[Outcome]:
        """Per layer or matrix what was asked and what was done."""

    @classmethod
    @abstractmethod
    def output_paths(cls, output: Path, *, front: bool) -> list[Path]:
        """What :meth:`write` will write beside the plan at ``output``."""

    @abstractmethod
    def write(
        self,
        output: Path,
        plan: Plan,
        outcomes: Sequence[Outcome],
        found: Found,
        workdir: Workdir,
        reports: list[Path],
    ) -> Written:
        """Write the reports; say which files of the work folder belong beside the plan.

        Args:
            reports: gets the path of every report that was written, also if a later one fails.
        """


@dataclass(frozen=True)
class Written:
    """What a menu leaves.

    Attributes:
        moved: (file in the work folder, where it goes when all reports are written).
        plans: more plans, path -> plan.
    """

    moved: list[tuple[Path, Path]]
    plans: dict[Path, Plan]


MENUS: Registry[type[Menu]] = Registry("menu", "halfbyte.menus", "MENU")


def menus_of(options: SearchOptions, target: Target) -> dict[str, type[Menu]]:
    """What is searched, in order.

    Raises:
        HalfbyteError: something that the target does not have.
    """
    there = {name: MENUS[name] for name in target.menus}
    if options.spaces == "auto":
        return there if options.weights_from is None else {"activations": there["activations"]}
    asked = [OTHER_NAMES.get(name.strip(), name.strip()) for name in options.spaces.split(",")]
    for name in asked:
        if name not in there:
            raise HalfbyteError(
                f"--spaces: the target {target.name} does not have this, expected {', '.join(there)}, got {name}",
                fix="use --target gguf" if name == "types" else None,
            )
    return {name: menu for name, menu in there.items() if name in asked}


def weights_of(options: SearchOptions) -> str:
    """The weight quantiser, or the checkpoint whose codes were taken over: ``from NAME``."""
    if options.weights_from is None:
        return options.weights
    return f"from {home_expanded(options.weights_from).resolve().name}"


def check_options(options: SearchOptions, target: Target) -> None:
    """Refuse, before any work, values that cannot be right.

    Raises:
        HalfbyteError: the first that is not.
    """
    low, high = (target.recipe.a_bits[end] for end in (0, -1))
    if options.target_compression and not low / 8 <= options.target_compression <= high / 8:
        raise HalfbyteError(
            f"--target_compression: budget is out of range, expected {low / 8:g} (all A{low}) to {high / 8:g} "
            f"(all A{high}), got {options.target_compression}"
        )
    if options.tune and ("types" in target.menus or options.fitness != "kl"):  # GGUF's A8 layers have other weights
        raise HalfbyteError(
            "--tune: it fits the W4 codes of --target vllm or sim, with --fitness kl, to the whole model's KL",
            fix="leave it out",
        )
    check_suffix(Path(options.output))
    if (options.pareto or options.max_kl) and options.fitness != "kl":
        flag = "pareto" if options.pareto else "max_kl"
        raise HalfbyteError(f"--{flag}: it needs the whole model's KL", fix="leave --fitness at kl")
    target.check_options(options)
    target.recipe_for(options)
    target.transforms(options, tied=False)
    if options.weights_from is not None:
        _check_weights_from(options)
    for flag in ("size", "bpw", "ftype", "imatrix"):
        if getattr(options, flag) and "types" not in menus_of(options, target):
            raise HalfbyteError(
                f"--{flag}: only for types of a GGUF file", fix="search with --target gguf --spaces types"
            )


def _check_weights_from(options: SearchOptions) -> None:
    """Refuse what would change codes that are taken over."""
    usual = SearchOptions()
    allowed = {
        "transforms": ("auto", "none"),
        "weights": (usual.weights,),
        "alpha": (usual.alpha,),
        "tune": (usual.tune,),
        "spaces": ("auto", "activations", "a4a8"),
    }
    for flag, values in allowed.items():
        got = getattr(options, flag)
        if got not in values:
            raise HalfbyteError(
                f"--{flag}: does not go with --weights_from, whose codes stay as they are, "
                f"expected {' or '.join(map(str, values))}, got {got}",
                fix="leave it out",
            )
