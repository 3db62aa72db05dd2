"""Error bars of a log evidence cover it: 200 repetitions at each of many weights with known evidence."""

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_dgm.core.weights import evidence_error, log_mean, log_mean_exp, psis
from pyro_dgm.diagnostics.khat import judge

RNG = np.random.default_rng(5)
REPETITIONS = 200


def normal(scale, shift, features):
    """Log weights of q = N(shift, scale^2) for p = N(0, 1) in every coordinate; the evidence is one."""

    def draw(n):
        z = RNG.normal(size=(n, features))
        x = shift + scale * z
        return (0.5 * z**2 - 0.5 * x**2 + np.log(scale)).sum(1)

    return draw


def tail(df, scale):
    """A target with Student's tails, which a normal guide lacks."""

    def draw(n):
        x = scale * RNG.normal(size=n)
        return stats.t.logpdf(x, df) - stats.norm.logpdf(x, 0.0, scale)

    return draw


def skewed(shape, features):
    mean = shape / (1 + shape**2) ** 0.5 * (2 / np.pi) ** 0.5
    sd = (1 - mean**2) ** 0.5

    def draw(n):
        x = mean + sd * RNG.normal(size=(n, features))
        return (stats.skewnorm.logpdf(x, shape) - stats.norm.logpdf(x, mean, sd)).sum(1)

    return draw


CASES = {
    "narrow": normal(0.8, 0.0, 1),
    "narrow in five": normal(0.85, 0.0, 5),
    "wide in five": normal(1.2, 0.0, 5),
    "shifted in twenty": normal(1.0, 0.1, 20),
    "shifted and narrow": normal(0.75, 0.3, 2),
    "far too narrow": normal(0.62, 0.0, 1),
    "skewed in five": skewed(2.0, 5),
    "heavy tail": tail(10, 1.0),
    "heavy tail, matched": tail(5, 1.29),
}


@pytest.mark.parametrize("n", [1_000, 4_000])
@pytest.mark.parametrize("name", CASES)
def test_errors_of_the_evidence_cover_it(name, n):
    """95 % of 200, less three binomial errors of 1.5 %. Planted fault: the error by the smoothed weights alone covers
    75 to 87 % of the heaviest four at 1,000 draws."""
    hits = 0
    for _ in range(REPETITIONS):
        lw = CASES[name](n)
        hits += abs(float(log_mean(lw))) < 1.96 * evidence_error(lw, *psis(lw))
    assert hits / REPETITIONS > 0.95 - 3 * (0.05 * 0.95 / REPETITIONS) ** 0.5


def test_errors_cover_where_few_draws_hold_the_tail():
    """Student's tails in five dimensions, 600 sets of 1,000 draws: 96.8 %. Planted fault: 0.75 of the largest weight beside a
    cubic factor, as it was before, covers 93.7 %."""
    rng = np.random.default_rng(31)
    hits = []
    for df, scale in ((6, 1.0), (5, 1.29)):
        for _ in range(300):
            x = scale * rng.normal(size=(1_000, 5))
            lw = (stats.t.logpdf(x, df) - stats.norm.logpdf(x, 0.0, scale)).sum(1)
            hits.append(abs(float(log_mean(lw))) < 1.96 * evidence_error(lw, *psis(lw)))
    assert np.mean(hits) > 0.955


def test_errors_of_good_weights_stay_near_the_central_limit_theorem():
    """A wide error would cover, too: it is at most a third wider where k-hat is low."""
    lw = normal(1.1, 0.1, 3)(4_000)
    error = evidence_error(lw, *psis(lw))
    plain = np.exp(lw).std() / np.exp(lw).mean() / 4_000**0.5
    assert plain <= error < 1.35 * plain


def test_an_error_that_cannot_be_known_is_not_a_number():
    """Planted: a guide at 0.3 of the sd (k = 0.91), whose log mean is low by nats in most repetitions."""
    lw = normal(0.3, 0.0, 4)(1_000)
    verdict = judge(lw)
    assert verdict.log_evidence_error == np.inf and verdict.log_evidence < -0.5
    assert "nats of unknown error (k-hat is too high)" in str(verdict) and "inf" not in str(verdict)
    assert evidence_error(np.zeros(100), *psis(np.zeros(100))) == 0.0


@pytest.mark.parametrize("n", [4, 16, 64])
@pytest.mark.parametrize("sd", [0.1, 0.5, 1.0, 2.0])
def test_errors_of_few_chains_cover(n, sd):
    """As of annealing. Planted fault: the delta method alone covers 53 to 76 % at sd 2."""
    value, error = log_mean_exp(torch.as_tensor(sd * RNG.normal(size=(n, 2_000)) - 0.5 * sd**2))
    covered = float((value.abs() < 1.96 * error).double().mean())
    assert covered > (0.93 if n >= 16 else 0.89) and float(error.median()) < 3.0 * float(value.std())
