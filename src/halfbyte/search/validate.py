"""Whether one genome is better than another, or only luckier: paired differences, two rungs of text, validation.

Losses come as means over equal segments of a text. Two genomes are compared on the same segments, so what makes a
segment hard for both cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from halfbyte.core.errors import HalfbyteError
from halfbyte.search.problem import Genome

ELIMINATION_Z = 1.25  # standard errors above the best at which a genome is not measured further
TIE_Z = 1.0  # standard errors within which two finalists are ties
BLOCK_WINDOWS = 4  # fewer window means do not tell their own spread

Losses = Callable[[list[Genome], range], np.ndarray]
"""``losses(genomes, windows)``: mean loss per segment, float64 ``[genomes, windows, segments]``; known ones at once."""


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of ``a - b``, both ``[windows, segments]`` on the same text, and its standard error; inf for one value.

    Segments are neighbours in a text and mildly correlated, which makes an error over segments too small. From
    ``BLOCK_WINDOWS`` windows on the error over window means is taken where it is larger.
    """
    if a.shape != b.shape:
        raise HalfbyteError(f"losses: not on the same segments, expected {b.shape}, got {a.shape}")
    differences = a - b
    if differences.size < 2:
        return float(differences.mean()), math.inf
    error = differences.std(ddof=1) / math.sqrt(differences.size)
    if len(differences) >= BLOCK_WINDOWS:
        error = max(error, differences.mean(axis=1).std(ddof=1) / math.sqrt(len(differences)))
    return float(differences.mean()), float(error)


def two_rungs(genomes: Iterable[Genome], best: Genome | None, losses: Losses, windows: int) -> dict[Genome, float]:
    """Score ``genomes``: a quarter of the text for all of them, the whole for those that could be better than ``best``.

    A genome whose paired difference to the best on the quarter is above ``ELIMINATION_Z`` standard errors is dropped.
    It scores the best's whole mean + that difference, so that all scores compare, and always more than the best, so
    that the lowest score is measured whole. This is successive halving with two rungs, and a test in place of the half
    (Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016;
    Maron and Moore, "Hoeffding races", NIPS 1994).

    Args:
        genomes: each is scored once.
        best: the genome to beat; None is the lowest of the first rung.
        losses: the measurement. It is asked again for what is known.
        windows: of the whole text.

    Returns:
        mean losses in the order of ``genomes``; ``best`` is among them only if it is one of them.
    """
    candidates = list(dict.fromkeys(genomes))
    if not candidates:
        return {}
    quarter = range(max(1, windows // 4))
    first = dict(zip(candidates, losses(candidates, quarter), strict=True))
    if best is None:
        best = min(candidates, key=lambda genome: (float(first[genome].mean()), genome))
    whole_best = losses([best], range(windows))[0]
    level = float(whole_best.mean())
    scores = {best: level}
    for genome in candidates:
        difference, error = paired_difference(first[genome], whole_best[: len(quarter)])
        if difference > ELIMINATION_Z * error:
            scores[genome] = max(level + difference, math.nextafter(level, math.inf))
    hopeful = [genome for genome in candidates if genome not in scores]
    if hopeful:
        whole = losses(hopeful, range(windows))
        scores |= {genome: float(found.mean()) for genome, found in zip(hopeful, whole, strict=True)}
    return {genome: scores[genome] for genome in candidates}


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
) -> Choice:
    """The finalist with the lowest loss on text the search never saw; ties go by the mean over both texts.

    Args:
        validation: losses of each finalist on the validation text, ``[windows, segments]``.
        search: the same on the search text, in segments of the same length.
        z: standard errors within which a difference is noise.

    Raises:
        HalfbyteError: no finalists, not the same ones twice, or losses that are not on the same segments.
    """
    if not validation or set(validation) != set(search):
        raise HalfbyteError(f"finalists: losses on both texts are needed, got {len(validation)} and {len(search)}")
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
    return Choice(min(ties, key=overall), leader, ties, differences, float(np.median(floors)) if floors else 0.0)
