"""What of a posterior can be taken from its draws, from their weights, or not at all."""

import math

import numpy as np
import pytest

from pyro_dgm.diagnostics.exploration import Exploration
from pyro_dgm.diagnostics.khat import judge

N = 4000


def verdict(log_p, explored=None, seed=0, n=N):
    """On draws of a standard normal law, the target's log density up to a constant."""
    x = np.random.default_rng(seed).normal(size=(n, 2))
    log_weight = log_p(x) + 0.5 * (x**2).sum(1)
    return judge(log_weight, (explored or Exploration()).weighed(x, log_weight))


def normal(mean=0.0, sd=1.0):
    return lambda x: -0.5 * ((x[:, 0] - mean) / sd) ** 2 - 0.5 * x[:, 1] ** 2


def tailed(k, explored=None):
    """Nearly equal weights with a Pareto tail of shape k, which no draw's place tells."""
    rng = np.random.default_rng(0)
    rank = rng.permutation(N) + 0.5
    return judge(
        np.log1p(5e-4 * (rank / N) ** -k), (explored or Exploration()).weighed(rng.normal(size=(N, 2)), np.zeros(N))
    )


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (normal(), {"means": "as drawn", "sds": "as drawn", "quantiles": "as drawn", "tails": "as drawn"}),
        (normal(mean=0.4), {"means": "by weights", "sds": "as drawn", "quantiles": "by weights"}),
        (normal(sd=0.8), {"means": "as drawn", "sds": "by weights"}),
    ],
)
def test_each_statement_by_what_the_weights_change(target, expected):
    """Planted: hold all statements against the change of the mean alone; the narrow target's sds are then taken as drawn."""
    found = verdict(target).statements
    assert {k: found[k] for k in expected} == expected
    assert found["evidence"] == "by weights"


def test_tails_are_not_known_where_weights_have_a_tail():
    """Planted: let tails pass where the gap is small, as means do."""
    found = tailed(0.9)
    assert found.threshold < found.k < 1.0 and found.gap < 0.05
    assert found.statements["means"] == "as drawn" and found.statements["tails"] == "not known"


@pytest.mark.parametrize("what", ["other_modes", "unsure", "unfitted"])
def test_nothing_is_known_where_something_speaks_against_all(what):
    found = verdict(normal(), Exploration(**{what: 1 if what == "other_modes" else "it was not"}))
    assert set(found.statements.values()) == {"not known", "a bound"}


def test_chains_that_leave_draws_with_equal_weights_leave_nothing():
    """Planted: forget the chains; a guide that lacks what its draws do not show is then taken as drawn."""
    assert set(verdict(normal(), Exploration(drift=0.4)).statements.values()) == {"not known", "a bound"}
    assert verdict(normal(mean=0.4), Exploration(drift=0.4)).statements["means"] == "by weights"


@pytest.mark.parametrize(
    ("deviation", "status", "means"),
    [
        (math.inf, "bad", "not known"),
        (0.15, "usable", "as drawn"),
        (0.05, "good", "as drawn"),
        (0.3, "bad", "not known"),
    ],
)
def test_a_tail_beyond_all_weights_with_chains_that_stay(deviation, status, means):
    """A funnel's: a gap of a few hundredths and k-hat above 1. Planted: ask for k-hat below 1 alone."""
    found = tailed(1.25, Exploration(deviation=deviation))
    assert found.k > 1.1 and found.gap < 0.05
    assert (found.status, found.statements["means"]) == (status, means)


def test_the_text_says_it_where_statements_differ():
    text = str(verdict(normal(sd=0.8)))
    assert "Trust: means as drawn" in text or "Trust: means" in text and "sds" in text.split("by weights")[0]
    assert "Trust" not in str(verdict(normal()))


def test_the_advice_does_not_contradict_the_statements():
    """Draws that chains leave where they are, of which weights change an sd. Before: sds by weights, and no weights to be used."""
    found = verdict(normal(sd=0.8), Exploration(deviation=0.05))
    assert found.status == "good" and found.statements["sds"] == "by weights"
    assert "without weights" not in found.next_step and "resample(idata) for what is said by weights" in found.next_step


def test_a_container_from_before_has_no_more_than_its_weights():
    """Sizes that were not kept are infinite, so that nothing is taken as drawn by them."""
    log_weight = np.random.default_rng(0).normal(0.0, 0.1, N)
    found = judge(log_weight).statements
    assert found["means"] == "as drawn" and found["sds"] == "by weights"
