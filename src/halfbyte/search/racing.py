"""Staged evaluation: few tokens for every candidate, more only for those that could still win.

Losses come as means over equal segments of the search text. Two genomes are compared on the same segments, so what
makes a segment hard for both cancels out. A candidate whose loss is higher than the incumbent's by more than chance
explains is dropped early, with an estimate for a score: the idea of races (Maron and Moore, "Hoeffding races", NIPS
1994; Birattari et al., "A racing algorithm for configuring metaheuristics", GECCO 2002).

One incumbent is itself noisy: what rounding does to its segments would enter every comparison. So candidates are
compared with the mean of many genomes that are measured completely (anchors, the incumbent's relatives), moved to the
incumbent's level: a control variate with half the variance.

Segments are neighbours in a text and mildly correlated, which makes a standard error over segments too small. From
``BLOCK_WINDOWS`` windows on the standard error over window means is taken where it is larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.problem import Genome

STAGES = (2, 4, 8)  # windows measured after each stage
# Standard errors above the incumbent at which a candidate is out. In simulated searches (20 texts of the kind in
# tests/search/test_racing.py) 1.25 with these stages reads 0.33 to 0.38 of the tokens, and what is found is as good
# within 0.3 %; 1 and 1.5 find the same for 0.32 to 0.35 and 0.34 to 0.40.
ELIMINATION_Z = 1.25
TIE_Z = 1.0  # standard errors within which two finalists are ties
ANCHORS = 24  # complete genomes to compare with; more are older and less alike
BLOCK_WINDOWS = 4  # fewer window means do not tell their own spread


class Measure(Protocol):
    """``measure(genomes, windows)``: mean loss per segment, float64 ``[genomes, windows, segments]``.

    A pure function of each genome and window. Called again for what is known (the incumbent, the anchors), it should
    answer from memory.
    """

    def __call__(self, genomes: list[Genome], windows: range) -> np.ndarray: ...


@dataclass(frozen=True)
class Raced:
    """What a race says of a genome.

    Attributes:
        score: mean loss over all windows; estimated from those measured unless ``complete``.
        windows: how many were measured.
        complete: whether all of them were.
    """

    score: float
    windows: int
    complete: bool


def race(
    genomes: Iterable[Genome],
    incumbent: Genome | None,
    measure: Measure,
    stages: Sequence[int] = STAGES,
    z: float = ELIMINATION_Z,
    anchors: Sequence[Genome] = (),
) -> dict[Genome, Raced]:
    """Score ``genomes``, spending windows on those that could be better than ``incumbent``.

    After each stage the paired difference d of a candidate to the yardstick (the anchors' mean, at the incumbent's
    level) is known with a standard error se, and the candidate goes on unless d > z × se. A dropped one scores the
    incumbent's complete mean + d, so all scores compare; it is above the incumbent's, so the best genome is always a
    complete one.

    Args:
        genomes: the candidates; each is raced once.
        incumbent: a genome to beat, whose windows are all measured. None: after the first stage the best candidate is
            measured completely and is the incumbent of this race.
        measure: the losses.
        stages: windows measured after each stage, rising; the last is all of them.
        z: standard errors above the incumbent at which a candidate is dropped; infinite measures everything.
        anchors: genomes whose windows are all measured, best the last ``ANCHORS`` complete ones; the incumbent alone if
            there are none.

    Returns:
        one Raced per candidate, in their order; the incumbent is among them only if it was a candidate.

    Raises:
        HalfbyteError: the stages do not rise from at least one.
    """
    if not stages or stages[0] < 1 or list(stages) != sorted(set(stages)):
        raise HalfbyteError("stages must rise from at least one window", where="race", got=tuple(stages))
    candidates = list(dict.fromkeys(genomes))
    known: dict[Genome, np.ndarray] = {}  # [windows so far, segments]

    def extend(members: list[Genome], windows: int) -> None:
        """Measure ``members``, all equally far, up to ``windows``."""
        start = len(known[members[0]]) if members and members[0] in known else 0
        if not members or start == windows:
            return
        for genome, losses in zip(members, measure(members, range(start, windows)), strict=True):
            known[genome] = np.concatenate([known[genome], losses]) if start else losses

    if incumbent is None:
        extend(candidates, stages[0])
        incumbent = min(candidates, key=lambda genome: (float(known[genome].mean()), genome), default=None)
        if incumbent is None:
            return {}
    extend([incumbent], stages[-1])
    reference = float(known[incumbent].mean())
    yardstick = known[incumbent]  # [windows, segments]
    if anchors:
        yardstick = measure(list(dict.fromkeys(anchors)), range(stages[-1])).mean(axis=0)
        yardstick = yardstick + (reference - float(yardstick.mean()))
    raced = {incumbent: Raced(reference, stages[-1], True)}
    running = [genome for genome in candidates if genome != incumbent]
    for stage in stages:
        extend(running, stage)
        if stage == stages[-1]:
            break
        ahead = []
        for genome in running:
            difference, error = paired_difference(known[genome], yardstick[:stage])
            if difference > z * error:
                score = max(reference + difference, math.nextafter(reference, math.inf))
                raced[genome] = Raced(score, stage, False)
            else:
                ahead.append(genome)
        running = ahead
    raced |= {genome: Raced(float(known[genome].mean()), stages[-1], True) for genome in running}
    return {genome: raced[genome] for genome in candidates}


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of ``a - b``, both ``[windows, segments]`` on the same text, and its standard error; inf for one value."""
    if a.shape != b.shape:
        raise HalfbyteError("losses are not on the same segments", where="race", expected=b.shape, got=a.shape)
    differences = a - b
    if differences.size < 2:
        return float(differences.mean()), math.inf
    error = differences.std(ddof=1) / math.sqrt(differences.size)
    if len(differences) >= BLOCK_WINDOWS:
        error = max(error, differences.mean(axis=1).std(ddof=1) / math.sqrt(len(differences)))
    return float(differences.mean()), float(error)


@dataclass(frozen=True)
class Choice:
    """The winner among finalists.

    Attributes:
        winner: the genome to take.
        leader: the genome with the lowest validation mean; the winner is a tie of it.
        ties: the finalists that the validation text cannot tell from the leader, by rising validation mean; the leader
            is the first.
        differences: of each finalist to the leader on the validation text: (mean, noise floor = z × standard error).
        noise_floor: the middle one of the other finalists' noise floors; 0 for a single finalist.
    """

    winner: Genome
    leader: Genome
    ties: tuple[Genome, ...]
    differences: dict[Genome, tuple[float, float]]
    noise_floor: float


def choose(
    validation: Mapping[Genome, np.ndarray],
    search: Mapping[Genome, np.ndarray],
    z: float = TIE_Z,
    prefer: Iterable[Genome] = (),
) -> Choice:
    """The finalist with the lowest loss on text the search never saw; ties go by preference, then by both texts.

    Args:
        validation: losses of each finalist on the validation text, ``[windows, segments]``.
        search: the same on the search text, in segments of the same length.
        z: standard errors within which a difference is noise.
        prefer: finalists that win if they are ties, first ones first: those that were not picked for a low loss on the
            search text, which is in part luck. Other ties go by the mean over both texts together.

    Raises:
        HalfbyteError: no finalists, not the same ones twice, or losses that are not on the same segments.
    """
    if not validation or set(validation) != set(search):
        raise HalfbyteError(
            "finalists need losses on both texts", where="choose", expected=len(validation), got=len(search)
        )
    means = {genome: float(losses.mean()) for genome, losses in validation.items()}
    ranked = sorted(means, key=lambda genome: (means[genome], genome))
    leader = ranked[0]
    differences = {leader: (0.0, 0.0)}
    for genome in ranked[1:]:
        difference, error = paired_difference(validation[genome], validation[leader])
        differences[genome] = difference, z * error
    ties = tuple(genome for genome in ranked if differences[genome][0] <= differences[genome][1])

    def overall(genome: Genome) -> tuple[float, Genome]:
        return float(np.concatenate([validation[genome].ravel(), search[genome].ravel()]).mean()), genome

    floors = [differences[genome][1] for genome in ranked[1:]]
    winner = next((genome for genome in prefer if genome in ties), min(ties, key=overall))
    return Choice(winner, leader, ties, differences, float(np.median(floors)) if floors else 0.0)
