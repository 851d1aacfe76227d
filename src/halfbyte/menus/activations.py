"""The menu of activation bits: W4 codes for every layer, and 4 or 8 activation bits for every unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from halfbyte.core.distributed import ALONE, Group, processes
from halfbyte.core.files import sha256
from halfbyte.core.progress import report
from halfbyte.menus import Menu, Model, Setting, Written
from halfbyte.models.estimate import MemoryEstimate, check_memory, estimate_search, fits
from halfbyte.models.layers import Outcome, layers_of, mean_bits_fraction, units_of
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied, linear, move_
from halfbyte.plan import Codes, Plan, codes_path, load_codes, save_codes
from halfbyte.prepare.simulation import become_simulation_
from halfbyte.prepare.token_weights import STAGE as WEIGH_STAGE
from halfbyte.prepare.tune import BATCH_TOKENS, Judged, tuned_codes
from halfbyte.prepare.tune import STAGE as TUNE_STAGE
from halfbyte.prepare.walk import PREPARED, Prepared, batches_of, load_prepared_, prepare_, save_prepared
from halfbyte.prepare.walk import STAGE as PREPARE_STAGE
from halfbyte.quant.quant_linear import Bits
from halfbyte.report.search_reports import ACTIVATION_REPORTS, FRONT_REPORTS, beside, write_activation_reports
from halfbyte.search.evaluator import KLEvaluator
from halfbyte.search.problem import Genome, Problem
from halfbyte.search.reference import Reference, reference
from halfbyte.search.run import TUNED, Found
from halfbyte.search.sensitivity import activation_problem, output_gradient_power, rule_genome, unit_errors, unit_ratios
from halfbyte.workdir import Workdir

TUNED_CODES = "codes-tuned.safetensors"
FISHER_WINDOWS = 4  # of calibration text, for loss gradients
GRADIENTS = "loss gradients"  # the stage
WEIGHED_AS = 4.0  # forward passes that weighing calibration tokens takes as long as
PREPARED_AS = 2.5  # the same for preparation, per calibration token, ...
CODES_AS = 20_000.0  # ... and tokens of forward passes for what does not depend on the text
TUNED_AS = 8.0  # forward passes that a step of tuning takes as long as, per token of the step
FRONT = tuple(step / 10 for step in range(11))  # budgets of a front, from the cheapest plan to the dearest
KNAPSACKS = {"kl": "KL", "fisher": "Fisher", "mse": "MSE"}
SCORES = {
    "kl": "KL(reference ‖ quantised), nats per token",
    "fisher": "Fisher-weighted squared error",
    "mse": "MAC-weighted mean squared error",
}


class ActivationMenu(Menu):
    """One or two formats for every unit, such as int4/a4 and int4/a8; the budget is the mean of activation bits / 8."""

    name, title = "activations", "activation bits"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.packed, self.gradients = _memory_modes(setting)
        self.score_label = SCORES[self.options.fitness]
        self.on_whole_model = self.options.fitness == "kl"  # else the score is a sum of layer errors
        self.recipe = setting.recipe
        self.on_search_text = self.on_validation_text = None

    def check(self, source: SourceModel) -> None:
        transforms = self.setting.target.transforms(self.options, tied=is_tied(source.model, source.family))
        self.recipe = replace(self.setting.recipe, transforms=transforms)
        self.units = units_of(layers_of(source.model, source.family), source.family, self.options.granularity)
        self.widths = [self.setting.target.widths(unit) for unit in self.units]
        macs = [unit.macs for unit in self.units]
        least = mean_bits_fraction(self.units, [menu[0] for menu in self.widths])
        self.budget = self.options.target_compression or max(self.setting.target.default_budget, least)
        activation_problem(macs, self.budget, [0.0] * len(macs), self.widths)  # refuses a budget that cannot be met

    def effort(self) -> dict[str, float]:
        calib = 1.0 * self.options.calib_tokens
        weighs = self.recipe.quantiser.looks_at_inputs and self.options.weights_from is None
        work = {WEIGH_STAGE: WEIGHED_AS * calib} if weighs else {}
        work[PREPARE_STAGE] = PREPARED_AS * calib + CODES_AS
        if self.gradients:
            work[GRADIENTS] = 1.2 * FISHER_WINDOWS * self.options.ctx
        if self.on_whole_model:
            work |= self.search_effort(len(self.units))
        if self.options.tune:
            work[TUNE_STAGE] = TUNED_AS * BATCH_TOKENS * self.options.tune
        return work

    @property
    def losses_stage(self) -> str:
        return f"KL of each unit at A{self.recipe.a_bits[0]}"

    def prepare(self, model: Model) -> None:
        source, device, workdir = model.source, self.setting.device, model.workdir
        answers = model.reference if self.on_whole_model else None
        if answers is not None:
            answers = self._transformed(answers, source)
        head = linear(source.model, source.family.head).weight
        self.prepared = self._prepared(model)
        move_(source.model, source.family, device, without_embedding=self.packed and not self.gradients)
        head_name = f"{source.family.head}.weight"
        if self.options.weights_from is not None and head_name in self.prepared.codes.parameters:
            assert answers is not None
            answers = answers.for_head(head.to(device), linear(source.model, source.family.head).weight)
        if self.gradients:
            self._measure_gradients(model)
        if answers is not None:
            parts = answers.split(len(model.windows["search"]))
            self.on_search_text, self.on_validation_text = (
                KLEvaluator(source.model, source.family, self.units, model.windows[part], own, self.widths)
                for part, own in zip(("search", "valid"), parts, strict=True)
            )
        self._record = self._search_record(model)
        gains = workdir.value("unit_gains", self._gains)
        self.problem = activation_problem([unit.macs for unit in self.units], self.budget, gains, self.widths)

    def starts(self, problem: Problem) -> dict[str, Genome]:
        """The sensitivity rule, and exact knapsacks over scores of single units, Fisher-weighted errors, and both."""
        rows, last = self.prepared.sensitivity, max(unit.block for unit in self.units)
        ratios = unit_ratios(self.units, rows)
        edges = [unit.block in (0, last) for unit in self.units]
        by_ratio = self._valued(problem, ratios)  # brought to the budget by the same ratios
        found = {
            "rule": by_ratio.fill(by_ratio.repair(rule_genome(problem, ratios, edges))),
            f"{KNAPSACKS[self.options.fitness]} knapsack": problem.knapsack(),
        }
        if self.on_whole_model and any(row.grad_power for row in rows.values()):
            fisher = self._table_gains("fisher")
            found["Fisher knapsack"] = self._valued(problem, fisher).knapsack()
            measured = [losses[0] for losses in problem.losses]
            total, total_fisher = sum(measured) or 1.0, sum(fisher) or 1.0
            both = [a / total + b / total_fisher for a, b in zip(measured, fisher, strict=True)]
            found["KL + Fisher knapsack"] = self._valued(problem, both).knapsack()
        return found

    def ends(self, problem: Problem) -> dict[str, Genome]:
        low, high = self.recipe.a_bits[0], self.recipe.a_bits[-1]
        return {f"all A{high}": problem.dearest, f"all A{low}": problem.cheapest}

    def choice(self, genome: Genome) -> dict[str, int | str]:
        return {unit.name: bits for unit, bits in zip(self.units, self._bits(genome), strict=True)}

    def _bits(self, genome: Genome) -> list[int]:
        """The activation bits of every unit."""
        return [menu[gene] for menu, gene in zip(self.widths, genome, strict=True)]

    def _valued(self, problem: Problem, gains: Sequence[float]) -> Problem:
        """The same problem with other gains of each unit's last format over its first."""
        menus = zip(gains, self.widths, strict=True)
        return problem.with_losses([(gain, 0.0)[-len(menu) :] for gain, menu in menus])

    def front_budgets(self) -> Sequence[tuple[str, int]]:
        low, high = (self.problem.spent(end) for end in (self.problem.cheapest, self.problem.dearest))
        budgets = [low + round(share * (high - low)) for share in FRONT]
        return [(f"{self._fraction(budget):.2f}", budget) for budget in budgets]

    def _fraction(self, budget: int) -> float:
        """Mean activation bits / 8 that a budget in the problem's unit allows."""
        return budget / (8 * sum(unit.macs for unit in self.units))

    def to_refine(self, found: Found) -> dict[str, np.ndarray]:
        unseen = self.on_validation_text
        return {"": unseen.losses([found.genome])[0]} if self.options.tune and unseen is not None else {}

    def refine(self, model: Model, found: Found, before: Mapping[str, np.ndarray]) -> Found:
        """Tune the plan's scales, norms and biases."""
        path = _codes_of(model.workdir, refined=True)

        def losses() -> np.ndarray | None:
            scorer = self._tuned(model, found, path)
            return None if scorer is None else scorer.losses([found.genome])[0]

        judged = self.judged(found, TUNED, before[""], losses, model.workdir, path)
        failed = "nothing was gained: the search's weights stay"
        report(TUNE_STAGE, 1, 1, judged.refinement.said if judged and judged.refinement else failed)
        return judged or found

    def _tuned(self, model: Model, found: Found, path: Path) -> KLEvaluator | None:
        """Write tuned codes to ``path``; what measures them on the validation text. None if nothing was gained."""
        answers = [
            self._transformed(part, model.source) for part in model.reference.split(len(model.windows["search"]))
        ]
        if processes().first and not path.exists():
            codes = self._tuned_codes(model, found, answers[0])
            if codes is not None:
                save_codes(path, codes)
        if not processes().from_first(path.exists()):
            return None
        processes().send_file(path)
        model.source.model.set_submodule(model.source.family.blocks, torch.nn.ModuleList())  # makes room
        source = model.loaded_anew(self.setting).source
        self._simulate_(source, load_codes(path), packed=self.packed)
        return KLEvaluator(source.model, source.family, self.units, model.windows["valid"], answers[1], self.widths)

    def _tuned_codes(self, model: Model, found: Found, on_search_text: Reference) -> Codes | None:
        source, tokens, device = model.source, model.windows["tune"], self.setting.device
        report(TUNE_STAGE, 0, self.options.tune, f"{tokens.numel()} tokens of calibration text")
        try:
            answers = self._transformed(reference(source.model, source.family, tokens, device=device), source)
            text = Judged(tokens, replace(answers, projected=answers.projected.cpu(), final=None))
            del answers
            self._simulate_(source, self.prepared.codes, packed=True)
            return tuned_codes(
                source,
                self.prepared.codes,
                self._bits_of_layers(found),
                self.recipe.scale_rule,
                text,
                Judged(model.windows["search"], on_search_text),
                steps=self.options.tune,
                seed=self.options.seed,
            )
        except torch.OutOfMemoryError:
            report(TUNE_STAGE, self.options.tune, self.options.tune, "too little memory on the device")
            return None

    def _simulate_(self, source: SourceModel, codes: Codes, *, packed: bool) -> None:
        """Make the unquantised model the simulation with these codes, on the device."""
        become_simulation_(source, codes, self.prepared.layers, device=self.setting.device, packed=packed)
        move_(source.model, source.family, self.setting.device)

    def _transformed(self, answers: Reference, source: SourceModel) -> Reference:
        """The answers of the unquantised ``source`` as the transformed model has to give them."""
        for transform in self.recipe.applied:
            answers = transform.reference(answers, source.model, source.family)
        return answers

    def _bits_of_layers(self, found: Found) -> dict[str, Bits]:
        chosen = self._bits(found.genome)
        return {layer.name: width for unit, width in zip(self.units, chosen, strict=True) for layer in unit.layers}

    def into_plan(self, plan: Plan, found: Found, workdir: Workdir) -> Plan:
        chosen = self._bits(found.genome)
        bits = self._bits_of_layers(found)
        return replace(
            plan,
            layers={name: replace(entry, a_bits=bits[name]) for name, entry in self.prepared.layers.items()},
            budget_asked=self._fraction(found.budget) if self.max_kl else self.budget,
            budget_reached=mean_bits_fraction(self.units, chosen),
            transforms=self.recipe.transforms,
            search={**self._record, **found.record(), "generations": len(found.history)},
            codes_sha256=sha256(_codes_of(workdir, refined=found.refined)),
        )

    def outcomes(self, plan: Plan, found: Found) -> list[Outcome]:
        asked = f"W4 g{self.options.group_size}"
        return [
            Outcome(name, asked, f"W{entry.w_bits} g{entry.group_size} A{entry.a_bits}", entry.note)
            for name, entry in plan.layers.items()
        ]

    @classmethod
    def output_paths(cls, output: Path, *, front: bool) -> list[Path]:
        kinds = (*ACTIVATION_REPORTS, *(FRONT_REPORTS if front else ()))
        return [codes_path(output), *(beside(output, kind) for kind in kinds)]

    def write(
        self,
        output: Path,
        plan: Plan,
        outcomes: Sequence[Outcome],
        found: Found,
        workdir: Workdir,
        reports: list[Path],
    ) -> Written:
        own = [outcome for outcome in outcomes if outcome.layer in plan.layers]
        rows = self.prepared.sensitivity
        widths = (self.recipe.a_bits[0], self.recipe.a_bits[-1])
        losses = self.problem.losses
        for path in write_activation_reports(output, plan, own, rows, self.units, found, widths, losses):
            reports.append(path)
        return Written([(_codes_of(workdir, refined=found.refined), codes_path(output))], {})

    def _prepared(self, model: Model) -> Prepared:
        """The W4 simulation: made by all processes, or read from where the first left it.

        That is where a run was interrupted, where the codes are a checkpoint's, which only the first process has, or
        where there is less text than processes.
        """
        source, workdir, group, device = model.source, model.workdir, processes(), self.setting.exact_device

        def prepare(group: Group) -> Prepared:
            return prepare_(
                source,
                model.windows["calib"],
                self.recipe,
                device=device,
                packed=self.packed,
                checkpoint=model.checkpoint,
                seed=self.options.seed,
                keep_on=torch.device("cpu") if self.packed else None,
                group=group,
            )

        def load() -> Prepared | None:
            return load_prepared_(source, workdir, self.recipe, device=self.setting.device, packed=self.packed)

        made = load() if group.first and workdir.resumed else None
        enough = len(batches_of(model.windows["calib"], device)) >= group.size
        together = group.from_first(made is None and model.checkpoint is None and enough)
        if made is None and (together or group.first):
            made = prepare(group if together else ALONE)
            if group.first:
                save_prepared(workdir, made)
        if not together:
            for path in (workdir.codes, workdir.folder / PREPARED):
                group.send_file(path)
        made = made or load()
        assert made is not None
        return made

    def _measure_gradients(self, model: Model) -> None:
        """Add the loss gradients at the W4 simulation's outputs, which transforms have scaled, to the sensitivity."""
        source, windows = model.source, model.windows["calib"][:FISHER_WINDOWS]
        layers = [layer for unit in self.units for layer in unit.layers]

        def measure() -> dict[str, float]:
            power: dict[str, float] = {}
            for done, power in enumerate(output_gradient_power(source.model, layers, windows), start=1):  # noqa: B007
                report(GRADIENTS, done, len(windows), f"window {done}")
            return power

        power = model.workdir.value("gradients", measure)
        for name, row in self.prepared.sensitivity.items():
            self.prepared.sensitivity[name] = replace(row, grad_power=power[name])

    def _gains(self) -> list[float]:
        """What each unit gains by A8 on its own, all others at A8."""
        if not isinstance(self.on_search_text, KLEvaluator):
            return self._table_gains(self.options.fitness)
        base = self.on_search_text.score(self.on_search_text.last_formats)
        found = []
        for loss in self.on_search_text.one_at_a_time():
            found.append(loss - base)
            report(self.losses_stage, len(found), len(self.units), self.units[len(found) - 1].name)
        return found

    def _table_gains(self, name: str) -> list[float]:
        """The same by layer errors, ``mse`` or ``fisher``; no unit gains less than nothing."""
        errors = unit_errors(self.units, self.prepared.sensitivity, name)
        return [max(0.0, low - high) for low, high in errors]

    def _search_record(self, model: Model) -> dict[str, object]:
        options = self.options
        taken = {"weights_from": model.checkpoint.record()} if model.checkpoint is not None else {}
        return {
            "algorithm": "genetic",
            "fitness": options.fitness,
            "population": options.ga_pop,
            "ctx": options.ctx,
            "alpha": options.alpha,
            "channel_scales": self.prepared.scales,
            **model.tokens,
            **taken,
        }


def _codes_of(workdir: Workdir, *, refined: bool) -> Path:
    """Where the codes are until the plan stands."""
    return workdir.folder / TUNED_CODES if refined else workdir.codes


def _memory_modes(setting: Setting) -> tuple[bool, bool]:
    """Whether codes stay packed while the model runs, and whether the loss is differentiated.

    ``fisher`` needs gradients; ``kl`` starts from them too, where they fit.

    Raises:
        HalfbyteError: there is too little memory.
    """
    options, origin, device = setting.options, setting.origin, setting.device
    tokens = max(options.calib_tokens, 2 * options.search_tokens)

    def need(*, gradients: bool, packed: bool) -> MemoryEstimate:
        return estimate_search(
            origin.config,
            origin.family,
            setting.dtype,
            tokens,
            options.ctx,
            gradients=gradients,
            packed=packed,
            weighs_tokens=setting.recipe.quantiser.looks_at_inputs and options.weights_from is None,
        )

    fisher = options.fitness == "fisher"
    packed = options.codes == "packed"
    if options.codes == "auto":
        packed = not fits(need(gradients=fisher, packed=False), device)
    check_memory(need(gradients=fisher, packed=packed), device)
    wanted = fisher or (options.fitness == "kl" and fits(need(gradients=True, packed=packed), device))
    return packed, wanted


MENU = ActivationMenu
