"""What a search chooses from: activation bits for every unit, or a ggml type for every matrix. One file each.

Here is what every menu has in common: made from options, checked against a model, prepared, searched, written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from halfbyte.core.registry import Registry
from halfbyte.models.checkpoint import CheckpointCodes
from halfbyte.models.layers import Outcome
from halfbyte.models.loading import Origin, SourceModel, load
from halfbyte.options import SearchOptions
from halfbyte.plan import Plan
from halfbyte.prepare.recipe import Recipe
from halfbyte.search.genetic import GeneticSettings
from halfbyte.search.reference import Reference
from halfbyte.search.run import Found, Searchable, search_menu
from halfbyte.targets import Target
from halfbyte.workdir import Workdir

ROUNDED = 0.9  # time of a candidate per token over that of the reference, whose head is multiplied twice
ELITE = 2  # genomes of a generation that are known already
LIKELY = 0.8  # of the generations that were asked for: most searches find nothing better before the last
SHARE = 0.85  # of the search text, for a genome
VALIDATED = 14  # genomes that are measured on the validation text


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
    def exact_device(self) -> torch.device:
        """Where to prepare: MPS has neither fp64 nor the factorisations of GPTQ."""
        return torch.device("cpu") if self.device.type == "mps" else self.device


@dataclass(frozen=True)
class Model:
    """What all menus of one command share.

    Attributes:
        source: the model, unquantised, in main memory.
        windows: ``calib``, ``search`` and ``valid`` text, int64 ``[windows, length]``.
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
        return replace(self, source=load(setting.origin, device=torch.device("cpu"), dtype=setting.dtype))


class Menu(Searchable):
    """One problem of a search: its units, the formats that each may have, and what a choice of them costs and loses.

    Used in this order: made from the options, :meth:`check`, :meth:`prepare`, :meth:`search`, :meth:`release`, then the
    plan and files.

    Args:
        setting: options, target, model that is not read yet.

    Raises:
        HalfbyteError: there is too little memory.
    """

    preparation_memory: int | None = None  # bytes on the device until the W4 codes stood
    front_share: ClassVar[int] = 5  # of the generations, for each budget of a front

    def __init__(self, setting: Setting) -> None:
        self.setting, self.options = setting, setting.options

    @abstractmethod
    def check(self, source: SourceModel) -> None:
        """Refuse, before any work, what this menu cannot do with the model.

        Raises:
            HalfbyteError: anything the user can put right.
        """

    @abstractmethod
    def prepare(self, model: Model) -> None:
        """The long work: candidates for every unit, and what each format loses alone. Changes ``model.source``."""

    @abstractmethod
    def effort(self) -> dict[str, float]:
        """What is to be done, stage -> tokens of whole forward passes that take as long; known after :meth:`check`."""

    def search_effort(self, units: int) -> dict[str, float]:
        """:meth:`effort` of what every menu does when it is prepared.

        Each unit is measured through half of the blocks on average, a genome on part of the text if it cannot win.
        """
        options = self.options
        genomes = options.ga_pop + LIKELY * options.ga_gen * max(1, options.ga_pop - ELITE)
        return {
            "losses of single units": ROUNDED * 0.5 * units * options.search_tokens,
            f"search of {self.title}": ROUNDED * SHARE * genomes * options.search_tokens,
            "validation": ROUNDED * VALIDATED * options.search_tokens,
        }

    @abstractmethod
    def front_budgets(self) -> Sequence[tuple[str, int]]:
        """(name, budget) of the points of a front."""

    def search(self, workdir: Workdir) -> Found:
        """The best choice under the budget, and if asked for those of a front of budgets."""
        options = self.options
        settings = GeneticSettings(population=max(2, options.ga_pop), generations=options.ga_gen)

        def run(settings: GeneticSettings, name: str, budget: int | None = None) -> Found:
            return search_menu(
                self,
                settings,
                seed=options.seed,
                state_file=workdir.folder / f"genetic-{self.name}{name}.json",
                resume=workdir.resumed,
                budget=budget,
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
