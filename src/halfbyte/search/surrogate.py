"""A Bayesian linear model of the score, and the genomes it proposes.

    score(genome) ≈ base + Σ weight[u] · feature[u](genome)

A problem says what its features are: for activation bits 1 where unit u is at the smaller choice, so that the weight is
what it gains by the larger; for weight types the loss predicted for its choice alone, so that the weight is a factor.
The prior of the weights is what was measured one unit at a time. Near the optimum many units lose at once and errors
compound, so the weights that count there are others; every scored genome says a little about them. Proposals follow
Thompson sampling: draw weights from the posterior, take the genome that is best for them (Thompson, "On the likelihood
that one unknown probability exceeds another in view of the evidence of two samples", Biometrika 25, 1933; Russo et al.,
"A tutorial on Thompson sampling", Foundations and Trends in Machine Learning 11, 2018, arXiv:1707.02038). What is best
for additive losses is a knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from halfbyte.search.space import Genome, SearchSpace

FLOOR = 0.5  # prior sd of a weight is (|weight| + FLOOR × mean |weight|) × a relative sd that the scores decide
RELATIVE = (0.4, 1.0)  # that relative sd before the scores: median and sd of its logarithm
RATIOS = np.geomspace(0.003, 30.0, 41)  # relative sd over noise in units of the scores' sd: what is tried
TRIES = 4  # samples drawn for a proposal that is not known yet
HEAT = 1.5  # by which each further sample's standard deviations grow
ROUNDING = 1e-12  # relative: no fit is better than this


@dataclass(frozen=True)
class Surrogate:
    """The posterior of the weights.

    Attributes:
        base: score of a genome whose features are all 0, by the line.
        mean: ``[units]``, in the scores' unit per feature.
        root: ``[units, features]``; the covariance of the weights is ``root @ root.T``.
        noise: sd of what the line does not explain in a score from all of the text, in the scores' unit.
        relative: prior sd of a weight relative to its size, as the scores have it.
    """

    base: float
    mean: np.ndarray
    root: np.ndarray
    noise: float
    relative: float

    def sample(self, rng: np.random.Generator, spread: float = 1.0) -> np.ndarray:
        """Weights ``[units]`` drawn from the posterior, its standard deviations times ``spread``."""
        return self.mean + spread * (self.root @ rng.standard_normal(self.root.shape[1]))


def fit(
    problem: SearchSpace, scores: Mapping[Genome, float], shares: Mapping[Genome, float] | None = None
) -> Surrogate:
    """The posterior of the weights of ``problem``'s units, from ``scores`` of its genomes.

    The prior is weight[u] ~ N(s g[u], (s r (|g[u]| + floor))²): g is ``problem.prior`` (all alike if 0), s a common
    factor, since errors of many units compound, with a relative sd of r too. The base has a flat prior. The posterior
    is in closed form; how far the prior is trusted (r) and the noise are those under which the scores are most likely
    (MacKay, "Bayesian interpolation", Neural Computation 4, 1992). With no more than one score it is the prior.

    Args:
        problem: one that has a line.
        scores: of genomes, in any unit.
        shares: of the text that a score comes from, 1 where nothing is said; its noise variance goes with 1 / share.
    """
    prior = problem.prior
    prior = prior / np.abs(prior).mean() if prior.any() else np.ones(problem.size)
    known = np.array(list(scores.values()), dtype=float)
    features = problem.features(scores)  # [scores, units]
    trust = np.sqrt([(shares or {}).get(genome, 1.0) for genome in scores])
    # A flat prior on the base: only differences to the weighted means count.
    weights = trust**2 / max(float(trust @ trust), ROUNDING)
    middle, middle_features = float(weights @ known), weights @ features
    losses, features = trust * (known - middle), trust[:, None] * (features - middle_features)
    factor = _slope(features @ prior, losses)

    # weights = factor × prior + basis @ b, with b ~ N(0, relative²)
    basis = factor * np.column_stack([np.diag(np.abs(prior) + FLOOR), prior])  # [units, units + 1]
    residual = losses - factor * (features @ prior)
    design = features @ basis  # [scores, units + 1]
    eigenvalues, vectors = np.linalg.eigh(design.T @ design)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    projected = vectors.T @ (design.T @ residual)

    power = max(float(residual @ residual), ROUNDING * float(losses @ losses))
    median, width = RELATIVE
    if power == 0.0:  # nothing to learn from
        mean = factor * prior
        return Surrogate(middle - float(middle_features @ mean), mean, median * basis, 0.0, median)
    freedom = len(losses) - 1  # the base takes one
    ratios = RATIOS**2 * freedom / power  # [ratios]: relative² / noise²
    fitted = (ratios[:, None] * projected**2 / (1 + np.outer(ratios, eigenvalues))).sum(axis=1)
    noises = np.maximum(power - fitted, ROUNDING * power) / freedom  # noise², its likeliest value for each ratio
    relatives = np.sqrt(ratios * noises)
    evidence = -0.5 * (freedom * np.log(noises) + np.log1p(np.outer(ratios, eigenvalues)).sum(axis=1))
    best = int(np.argmax(evidence - 0.5 * (np.log(relatives / median) / width) ** 2))

    kept = 1 / (1 + ratios[best] * eigenvalues)  # share of the prior variance that is left, per eigenvector
    mean = factor * prior + basis @ (vectors @ (ratios[best] * kept * projected))
    # The symmetric root: it does not depend on the basis of an eigenspace, which is arbitrary down to the last bit.
    root = relatives[best] * (basis @ (vectors * np.sqrt(kept)) @ vectors.T)
    base = middle - float(middle_features @ mean)
    return Surrogate(base, mean, root, math.sqrt(noises[best]), float(relatives[best]))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """The positive factor that takes ``x`` to ``y``: least squares, else the ratio of their sizes, else 1."""
    if not x.any() or not y.any():
        return 1.0
    slope = float(x @ y) / float(x @ x)
    return slope if slope > 0 else math.sqrt(float(y @ y) / float(x @ x))


def proposals(
    problem: SearchSpace,
    scores: Mapping[Genome, float],
    count: int,
    rng: np.random.Generator,
    shares: Mapping[Genome, float] | None = None,
) -> list[Genome]:
    """Up to ``count`` full genomes without a score, each once: the best for the mean weights, then for sampled ones.

    Where a sample's best genome is known already, the next sample is drawn from a wider distribution, ``TRIES`` times.
    """
    if count < 1:
        return []
    model = fit(problem, scores, shares)
    found: dict[Genome, None] = {}

    def add(line: np.ndarray) -> bool:
        genome = best_for(problem, line)
        new = genome not in scores and genome not in found
        if new:
            found[genome] = None
        return new

    add(model.mean)
    for _ in range(count - len(found)):
        for attempt in range(TRIES):
            if add(model.sample(rng, HEAT**attempt)):
                break
    return list(found)


def best_for(problem: SearchSpace, weights: np.ndarray) -> Genome:
    """The full genome that loses least by a line with these weights ``[units]``, or nearly so."""
    return problem.solve(weights)


def finalists(
    problem: SearchSpace, scores: Mapping[Genome, float], count: int, shares: Mapping[Genome, float] | None = None
) -> list[Genome]:
    """Up to ``count`` genomes that could be the best ones on another text, each once.

    The lowest score among many is in part luck, and the line through all scores averages luck out; but it does not know
    how units interact. So, in turns: the best genome for the mean weights (it may have no score yet), and the genomes
    with the lowest score, with the lowest value of the line, and with the lowest mean of both. By score alone where
    the problem has no line.
    """
    if not problem.has_line:
        return sorted(scores, key=lambda genome: (scores[genome], genome))[:count]
    model = fit(problem, scores, shares)
    genomes = sorted(scores)
    measured = np.array([scores[genome] for genome in genomes])
    line = model.base + problem.features(genomes) @ model.mean
    orders = [np.argsort(values, kind="stable").tolist() for values in (measured, line, (measured + line) / 2)]
    ranked = [
        best_for(problem, model.mean),
        *(genomes[place] for places in zip(*orders, strict=True) for place in places),
    ]
    return list(dict.fromkeys(ranked))[:count]
