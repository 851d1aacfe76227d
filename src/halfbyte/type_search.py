"""Search a ggml type for every matrix of a model under a size: what ``--target gguf`` adds to a plan.

candidates of every matrix → KL of each matrix at its smallest type → knapsack → genetic search → validation
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from halfbyte.allocation import validated
from halfbyte.core.distributed import Group
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import check_space
from halfbyte.core.progress import report
from halfbyte.engines.type_speed import seconds_per_weight
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied, linear
from halfbyte.options import SearchOptions
from halfbyte.prepare.candidates import Candidates, encode_candidates_, part_files
from halfbyte.prepare.menus import TensorMenu, menus_of
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.screen import screened
from halfbyte.prepare.size import budget_bytes_of, ftype_types, ftype_within
from halfbyte.quant.ggml.encoded import save_encoded
from halfbyte.results import FRONT_TYPES, TypesFound
from halfbyte.search.fitness import KLFitness, PricedEvaluator, stages_of
from halfbyte.search.genetic import GeneticSettings
from halfbyte.search.menu import Menu, pruned
from halfbyte.search.priced import offer_within
from halfbyte.search.problem import Genome
from halfbyte.search.reference import Reference
from halfbyte.search.runner import run_genetic
from halfbyte.search.type_evaluator import MixedTypes, TypeEvaluator
from halfbyte.transforms import expand, in_order
from halfbyte.workdir import Stages

DEFAULT_LIKE = "Q4_K_M"
FRONT_SHARE = 2  # of the generations, for each of them
GROUP_SIZE = 32  # weights that share a scale in most types; for the choice of channel scales
TINY = 1e-12  # nats: no matrix is free


def capacity(source: SourceModel, options: SearchOptions) -> tuple[int, list[TensorMenu]]:
    """Bytes that the matrices may take together, and the types to choose from.

    Raises:
        HalfbyteError: no mixture of types is that small.
    """
    menus = menus_of(source, mean_bits=4.5)
    room = budget_bytes_of(source, menus, size=options.size, bpw=options.bpw, ftype=named_size(options))
    menus = menus_of(source, 8 * room / sum(menu.rows * menu.columns for menu in menus))
    costs = [tuple(sorted(set(own))) for own in _costs(menus)]
    Menu(tuple(costs), tuple(tuple(range(len(own), 0, -1)) for own in costs), room)  # refuses what is too small
    return room, menus


def named_size(options: SearchOptions) -> str:
    """llama.cpp's file type whose size is the budget; empty where bytes or bits are."""
    return options.like or ("" if options.size or options.bpw else DEFAULT_LIKE)


class TypeSearch:
    """The search on one model and one set of texts.

    Args:
        source: the model, unquantised; transforms are folded into it.
        windows: ``calib``, ``search`` and ``valid`` text, int64 ``[windows, length]``.
        known: the unquantised model's answers on ``search`` and on ``valid``.
        room, menus: see :func:`capacity`.
        given: matrix -> importance in place of what is measured (:func:`halfbyte.calibration.imatrix.importance_for`).
        packed: the device is small: it holds encoded rows, and calibration activations stay in main memory.
    """

    def __init__(
        self,
        source: SourceModel,
        windows: Mapping[str, torch.Tensor],
        known: tuple[Reference, Reference],
        room: int,
        menus: Sequence[TensorMenu],
        given: Mapping[str, torch.Tensor],
        options: SearchOptions,
        stages: Stages,
        device: torch.device,
        group: Group,
        *,
        packed: bool = False,
    ) -> None:
        self.source, self.room, self.options, self.stages = source, room, options, stages
        self.report, self.group, self.tied = report, group, is_tied(source.model, source.family)
        where = torch.device("cpu") if device.type == "mps" else device  # see pipeline
        keep_on = torch.device("cpu") if packed else where
        self.screen: dict[str, float] = {}
        chosen = transforms_of(options, tied=is_tied(source.model, source.family))
        if chosen is None:
            bits = 8 * room / sum(menu.rows * menu.columns for menu in menus)
            calib, judged = windows["calib"], (windows["search"], known[0])
            devices = {"device": where, "keep_on": keep_on}
            self.screen = stages.value(
                "screen", lambda: screened(source, calib, *judged, menus, bits, options.weights, **devices)
            )
            best = min(self.screen, key=self.screen.__getitem__)
            chosen = tuple(name for name in best.split(",") if name)
        self.transforms = chosen
        recipe = Recipe(chosen, options.weights, group_size=GROUP_SIZE, scale_bits=8)
        head = linear(source.model, source.family.head).weight  # that the reference was made with
        there = sum(path.stat().st_size for path in part_files(stages.candidates, menus) if path.exists())
        check_space(stages.candidates, sum(menu.nbytes(kind) for menu in menus for kind in menu.types) - there)
        stages.candidates.mkdir(parents=True, exist_ok=True)

        def encode() -> Candidates:
            calib, folder = windows["calib"], stages.candidates
            return encode_candidates_(
                source, calib, recipe, menus, folder, device=where, imatrix=given, keep_on=keep_on
            )

        made = encode() if group.first else None
        for path in part_files(stages.candidates, menus):
            group.send_file(path)
        made = made or encode()  # reads the files
        self.encoded, self.errors = made.encoded, made.errors
        self.menus = [_pruned(menu, made.errors[menu.name]) for menu in menus]
        self.mixed = MixedTypes(source.model, source.family, self.menus, made.encoded, device, packed=packed)
        self.evaluator, self.judge = (
            TypeEvaluator(self.mixed, windows[part], answers, group=group, head=head)
            for part, answers in zip(("search", "valid"), known, strict=True)
        )

    @cached_property
    def losses(self) -> list[list[float]]:
        """What each type of each matrix adds to the KL: measured for the smallest, by output error for the others.

        What the model in its dtype loses by folding alone is subtracted: in bf16 it would count in every matrix. KL is
        quadratic in a small error of one matrix, and so is the output error; the measured KL of a type that changes
        little would be noise.
        """

        def measure() -> list[float]:
            found = [0.0] * len(self.menus)
            folding = self.evaluator.score(self.mixed.original)
            for done, (at, loss) in enumerate(self.evaluator.each_alone([0] * len(self.menus)), start=1):
                found[at] = loss - folding
                report("KL of each matrix", done, len(found), self.menus[at].name)
            return found

        found = []
        for menu, smallest in zip(self.menus, self.stages.value("matrix_losses", measure), strict=True):
            errors = [self.errors[menu.name][kind] for kind in menu.types]
            largest = errors[0] or 1.0  # a matrix of zeros has no errors
            found.append([max(smallest, TINY) * error / largest for error in errors])
        return found

    def best(self, room: int, generations: int, like: str = "") -> TypesFound:
        """Search one size.

        Args:
            room: bytes that the matrices may take.
            generations: of the genetic algorithm.
            like: llama.cpp's file type of about that size, to be as fast as, and to start from too.
        """
        rival = like or named_size(self.options) or ftype_within(self.source, self.menus, room)
        theirs = ftype_types(self.source, self.menus, rival)
        limit = self._seconds(theirs) / self.options.speed if self.options.speed else math.inf
        times = [[self._matrix_seconds(menu, kind) for kind in menu.types] for menu in self.menus]
        offer, knapsack = offer_within(_costs(self.menus), self.losses, times, room, limit=limit)
        space = offer.space
        mixture = space.fill(space.repair(offer.below(self._below(theirs))))
        starts = {"knapsack": knapsack, "llama.cpp's mixture": mixture}
        evaluator, judge = (PricedEvaluator(text, offer) for text in (self.evaluator, self.judge))
        algorithm = run_genetic(
            space,
            GeneticSettings(population=self.options.ga_pop, generations=generations),
            seeds=list(starts.values()),
            seed=self.options.seed,
            fitness=KLFitness(evaluator, stages_of(evaluator.windows)),
            state_file=self.stages.folder / f"types{like and '-'}{like}.json",
            resume=self.stages.resumed,
            group=self.group,
        )
        report("validation", 0, 1, f"{judge.windows * judge.length} tokens each")
        allowed = max(1.0, offer.time(knapsack))
        choice = validated(starts.values(), algorithm, evaluator, judge, lambda one: offer.time(one) <= allowed)
        winner = offer.whole(choice.winner)
        labels = {genome: label for label, genome in starts.items()}
        report("validation", 1, 1, f"noise floor {choice.noise_floor:.2g}")
        types = {menu.name: menu.types[gene] for menu, gene in zip(self.menus, winner, strict=True)}
        named = {**starts, "plan": choice.winner}
        return TypesFound(
            transforms=self.transforms,
            types=types,
            capacity=room,
            nbytes=space.spent(choice.winner),
            losses={label: self.judge.score(offer.whole(genome)) for label, genome in named.items()},
            history=algorithm.history,
            about={
                "evaluations": len(algorithm.scores),
                "finalists": len(choice.differences),
                "ties": len(choice.ties),
                "noise_floor": choice.noise_floor,
                "winner": labels.get(choice.winner, "genetic search"),
                "transforms_tried": self.screen,
                "rival": rival,
                "predicted_speed": self._seconds(theirs) / self._seconds(types),
                "price_of_time": offer.price,
            },
            rows=[
                {
                    "matrix": menu.name,
                    "rows": menu.rows,
                    "columns": menu.columns,
                    "type": types[menu.name],
                    "bytes": menu.nbytes(types[menu.name]),
                    "kl_alone": losses[gene],
                }
                for menu, losses, gene in zip(self.menus, self.losses, winner, strict=True)
            ],
        )

    def front(self, known: TypesFound) -> dict[str, TypesFound]:
        """llama.cpp's file type -> the best mixture of its size, by shorter searches; those that the menus reach.

        Args:
            known: the winner of one size.
        """
        sizes = [sum(menu.nbytes(menu.types[end]) for menu in self.menus) for end in (0, -1)]
        found = {}
        for like in FRONT_TYPES:
            room = budget_bytes_of(self.source, self.menus, size="", bpw=0, ftype=like)
            if room == known.capacity:
                found[like] = known
            elif sizes[0] < room < sizes[1]:
                found[like] = self.best(room, max(1, self.options.ga_gen // FRONT_SHARE), like)
        return found

    def _below(self, types: Mapping[str, str]) -> Genome:
        """A mixture in types on the menus that are no larger."""
        genome = []
        for menu in self.menus:
            wanted = menu.nbytes(types[menu.name])
            fitting = [gene for gene, kind in enumerate(menu.types) if menu.nbytes(kind) <= wanted]
            genome.append(fitting[-1] if fitting else 0)
        return tuple(genome)

    def _matrix_seconds(self, menu: TensorMenu, kind: str) -> float:
        """What llama.cpp is expected to take for a matrix per generated token: an embedding is only looked up."""
        is_read = menu.name != self.source.family.embedding or self.tied
        return is_read * menu.rows * menu.columns * seconds_per_weight(kind)

    def _seconds(self, types: Mapping[str, str]) -> float:
        return sum(self._matrix_seconds(menu, types[menu.name]) for menu in self.menus)

    def save(self, found: TypesFound, like: str = "") -> None:
        """Write the encoded matrices of a mixture, and the parameters that transforms changed."""
        rows = {(name, kind): self.encoded.rows(name, kind) for name, kind in found.types.items()}
        save_encoded(self.stages.types(like), rows, self.encoded.extra)


def transforms_of(options: SearchOptions, *, tied: bool) -> tuple[str, ...] | None:
    """What is folded before matrices are encoded; None: what helps.

    Args:
        tied: the model's output head is its embedding.

    Raises:
        HalfbyteError: a transform that the model's file cannot hold.
    """
    if options.transforms == "auto":
        return None
    chosen = expand(options.transforms, "gguf", tied=tied)
    if tied and any(known.needs_untied_head for known in in_order(chosen)):
        raise HalfbyteError(
            "R1 would need a second vocabulary matrix in the file",
            where="--transforms",
            expected="smooth, r2 or none",
            got="an output head that is tied to the embedding",
            fix="leave it out, or search with --spaces a4a8",
        )
    return chosen


def _costs(menus: Sequence[TensorMenu]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(menu.nbytes(kind) for kind in menu.types) for menu in menus)


def _pruned(menu: TensorMenu, errors: Mapping[str, float]) -> TensorMenu:
    """Without types for which another one is no larger and no worse."""
    kept = pruned([menu.nbytes(kind) for kind in menu.types], [errors[kind] for kind in menu.types])
    return replace(menu, types=tuple(menu.types[at] for at in kept))
