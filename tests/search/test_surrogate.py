from __future__ import annotations

import time

import numpy as np
import pytest

from halfbyte.search.baselines import knapsack_genome, random_genome
from halfbyte.search.problem import Problem
from halfbyte.search.surrogate import FLOOR, best_for, finalists, fit, proposals

BLOCK = (9, 7, 74, 37)


def lowered(genomes):
    return (np.array(genomes) == 4).astype(float)


def draw(problem, count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_genome(problem, rng) for _ in range(count)]


def wrong_prior(seed, size=48, error=0.8):
    """A problem whose gains are measured badly, and the gains that count."""
    rng = np.random.default_rng(seed)
    gains = np.exp(rng.normal(0, 1, size))
    prior = gains * np.exp(rng.normal(0, error, size))
    return Problem(BLOCK * (size // 4), 0.6, priority=tuple(prior)), gains


def score_of(problem, gains, noise=0.0, seed=9):
    rng = np.random.default_rng(seed)
    return lambda genome: 2.0 + float(lowered([genome])[0] @ gains) + noise * float(rng.normal())


def test_scores_correct_a_wrong_prior():
    problem, gains = wrong_prior(0)
    score = score_of(problem, gains, noise=0.1)
    model = fit(problem, {genome: score(genome) for genome in draw(problem, 400)})
    prior = np.array(problem.priority)
    assert np.corrcoef(np.log(prior), np.log(gains))[0, 1] < 0.9
    assert np.corrcoef(model.mean, gains)[0, 1] > 0.99
    assert model.noise == pytest.approx(0.1, rel=0.2)
    best, found, before = (score_of(problem, gains)(best_for(problem, values)) for values in (gains, model.mean, prior))
    assert found - best < 0.05 * (before - best)


def test_the_posterior_is_the_textbooks():
    """Gains, base and common factor as one Gaussian vector, conditioned on the scores; scores of unequal worth."""
    problem, gains = wrong_prior(1, size=12)
    genomes = sorted(set(draw(problem, 12)))
    score = score_of(problem, gains, noise=0.5)
    scores = {genome: score(genome) for genome in genomes}
    shares = {genomes[0]: 0.25, genomes[3]: 0.5}
    model = fit(problem, scores, shares)

    x, y = lowered(genomes), np.array(list(scores.values()))
    w = np.array([shares.get(genome, 1.0) for genome in genomes])
    g = np.array(problem.priority)
    g /= g.mean()
    across, up = x @ g - w @ (x @ g) / w.sum(), y - w @ y / w.sum()
    factor = (w * across) @ up / ((w * across) @ across)
    prior_cov = model.relative**2 * factor**2 * (np.diag((g + FLOOR) ** 2) + np.outer(g, g))
    flat = 1e8  # variance of the base
    cov = x @ prior_cov @ x.T + flat + np.diag(model.noise**2 / w)
    gain = prior_cov @ x.T @ np.linalg.inv(cov)
    assert model.mean == pytest.approx(factor * g + gain @ (y - x @ g * factor), rel=1e-4)
    assert model.root @ model.root.T == pytest.approx(prior_cov - gain @ x @ prior_cov, rel=1e-3, abs=1e-6)
    assert w @ (y - model.base - x @ model.mean) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_without_scores_the_prior_speaks(count):
    problem, _ = wrong_prior(2)
    model = fit(problem, dict.fromkeys(draw(problem, count), 1.0))
    prior = np.array(problem.priority)
    assert model.mean == pytest.approx(prior / prior.mean())
    assert best_for(problem, model.mean) == problem.fill(knapsack_genome(problem, problem.priority))  # type: ignore[arg-type]
    samples = np.stack([model.sample(np.random.default_rng(seed)) for seed in range(300)])
    assert samples.std(axis=0).min() > 0.1


def test_samples_have_the_posterior_mean_and_covariance():
    problem, gains = wrong_prior(3, size=8)
    score = score_of(problem, gains, noise=0.5)
    model = fit(problem, {genome: score(genome) for genome in draw(problem, 30)})
    rng = np.random.default_rng(0)
    samples = np.stack([model.sample(rng) for _ in range(4000)])
    size = np.sqrt(np.diag(model.root @ model.root.T))
    assert np.abs((samples.mean(axis=0) - model.mean) / size).max() < 0.1
    assert np.cov(samples.T) / np.outer(size, size) == pytest.approx(
        model.root @ model.root.T / np.outer(size, size), abs=0.1
    )
    assert np.std([model.sample(rng, 3.0) for _ in range(400)], axis=0) / size == pytest.approx(3.0, rel=0.2)


def test_more_scores_say_more_and_partial_ones_less():
    problem, gains = wrong_prior(4)
    score = score_of(problem, gains, noise=0.2)
    scores = {genome: score(genome) for genome in draw(problem, 300)}
    few = fit(problem, dict(list(scores.items())[:40]))
    many = fit(problem, scores)

    def width(model):
        return np.trace(model.root @ model.root.T)

    assert width(many) < 0.3 * width(few)
    worthless = dict.fromkeys(list(scores)[40:], 1e-6)
    assert fit(problem, scores, worthless).mean == pytest.approx(few.mean, abs=0.1 * float(gains.mean()))


def test_the_unit_of_scores_and_of_the_prior_does_not_matter():
    problem, gains = wrong_prior(5)
    score = score_of(problem, gains, noise=0.2)
    scores = {genome: score(genome) for genome in draw(problem, 100)}
    model = fit(problem, scores)
    far = fit(problem, {genome: 1000 * value - 7 for genome, value in scores.items()})
    assert far.mean == pytest.approx(1000 * model.mean)
    assert far.root == pytest.approx(1000 * model.root, rel=1e-6, abs=1e-6)
    other = Problem(problem.costs, problem.budget, priority=tuple(1e-6 * v for v in problem.priority))  # type: ignore[union-attr]
    assert fit(other, scores).mean == pytest.approx(model.mean)


@pytest.mark.parametrize("priority", [None, (0.0,) * 12, (-1.0,) * 12, (1.0, -1.0) * 6])
@pytest.mark.parametrize("scores_alike", [False, True])
def test_odd_priors_and_scores_give_finite_gains(priority, scores_alike):
    problem = Problem(BLOCK * 3, 0.7, priority=priority)
    rng = np.random.default_rng(0)
    model = fit(problem, {genome: 3.0 if scores_alike else float(rng.normal()) for genome in draw(problem, 30)})
    assert np.isfinite(model.mean).all()
    assert np.isfinite(model.root).all()
    assert proposals(problem, dict.fromkeys(draw(problem, 5), 1.0), 4, rng)


def test_scores_that_the_prior_explains_exactly():
    problem, _ = wrong_prior(6)
    gains = np.array(problem.priority)
    score = score_of(problem, gains)
    model = fit(problem, {genome: score(genome) for genome in draw(problem, 100)})
    assert model.mean == pytest.approx(gains, rel=1e-3)
    assert model.base == pytest.approx(2.0, rel=1e-3)


def test_proposals_are_new_full_and_led_by_the_mean():
    problem, gains = wrong_prior(7)
    score = score_of(problem, gains, noise=0.5)
    scores = {genome: score(genome) for genome in draw(problem, 60)}
    found = proposals(problem, scores, 14, np.random.default_rng(0))
    assert found[0] == best_for(problem, fit(problem, scores).mean)
    assert len(found) == len(set(found)) == 14
    assert not set(found) & set(scores)
    assert all(problem.feasible(genome) and problem.fill(genome) == genome for genome in found)
    assert found == proposals(problem, scores, 14, np.random.default_rng(0))
    again = proposals(problem, scores | {found[0]: score(found[0])}, 14, np.random.default_rng(0))
    assert found[0] not in again
    assert proposals(problem, scores, 0, np.random.default_rng(0)) == []


def test_proposals_end_when_there_is_nothing_left():
    problem = Problem((1, 1, 1), 2 / 3 + 1 / 6, priority=(3.0, 2.0, 1.0))
    space = problem.space(100)
    assert space is not None
    assert proposals(problem, dict.fromkeys(space, 1.0), 5, np.random.default_rng(0)) == []


def test_finalists_are_the_best_by_score_and_by_the_line():
    problem, gains = wrong_prior(8)
    score = score_of(problem, gains, noise=2.0)
    scores = {genome: score(genome) for genome in draw(problem, 300)}
    found = finalists(problem, scores, 6)
    model = fit(problem, scores)
    assert len(found) == len(set(found)) == 6
    assert found[0] == best_for(problem, model.mean)
    assert min(scores, key=lambda g: scores[g]) in found[:3]
    assert min(scores, key=lambda g: float(lowered([g])[0] @ model.mean)) in found[:4]
    true = score_of(problem, gains)
    assert true(found[0]) < true(min(scores, key=lambda g: scores[g]))  # luck does not last
    assert len(finalists(problem, dict(list(scores.items())[:2]), 9)) <= 3
    three = Problem((1, 1, 1), 0.75, choices=(4, 6, 8))
    assert finalists(three, {(4, 6, 8): 1.0, (6, 6, 6): 0.5}, 5) == [(6, 6, 6), (4, 6, 8)]


def test_a_large_fit_takes_a_fraction_of_a_second():
    problem = Problem(BLOCK * 75, 0.6)
    rng = np.random.default_rng(0)
    scores = {tuple(rng.choice([4, 8], 300).tolist()): float(rng.normal()) for _ in range(1000)}
    started = time.process_time()
    fit(problem, scores)
    assert time.process_time() - started < 2.0  # about 0.1 s on an idle machine
