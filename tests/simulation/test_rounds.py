"""Simulations for one observation, in rounds, and the prior in small regions."""

import functools
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

import pyro_dgm as dgm
from pyro_dgm.simulation import design

ROUNDS = sys.modules["pyro_dgm.simulation.rounds"]

DATA = {"x": torch.tensor([1.5, 0.4])}


def skewed(x=None):
    """Latents that are known to a tenth; over the posterior the prior's density changes by a factor of ten and more."""
    a = pyro.sample("a", dist.LogNormal(0.0, 0.3))
    b = pyro.sample("b", dist.Uniform(-1.0, 1.0))
    return pyro.sample("x", dist.Normal(torch.stack([a, b], -1), 0.15).to_event(1), obs=x)


@functools.cache
def posterior():
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(skewed, observed=["x"])
    sims = dgm.simulate(skewed, 1_000, observed=["x"], seed=0, progress=False)
    dgm.fit(dgm.ForwardKL(guide), sims, max_epochs=10, progress=False, seed=0)
    return guide.condition(**DATA)


def drawn(n, seed):
    return dgm.simulate(skewed, n, observed=["x"], seed=seed, proposal=posterior(), progress=False)


def test_chains_give_the_prior_inside_the_region(monkeypatch):
    """Against prior draws thrown away outside; planted faults: no steps and no weights, a density that forgets the prior."""
    rejected = drawn(2_000, 1)
    alike = lambda draws, site: scipy.stats.ks_2samp(draws[site], rejected[site]).pvalue
    monkeypatch.setattr(design, "_FEW", 1.1)
    walked = drawn(2_000, 2)
    assert walked.acceptance == pytest.approx(rejected.acceptance, rel=0.15)
    assert min(alike(walked, "a"), alike(walked, "b")) > 1e-3
    monkeypatch.setattr(design.Walkers, "draw", lambda self, n: self.vectors.unpack(self.others[:n]))
    assert min(alike(drawn(2_000, 2), site) for site in ("a", "b")) < 1e-6
    monkeypatch.undo()
    monkeypatch.setattr(design, "_FEW", 1.1)
    whole = design.Walkers.__init__
    flat = lambda self, vectors, prior, edge: whole(self, vectors, lambda rows: torch.zeros(len(rows["a"])), edge)
    monkeypatch.setattr(design.Walkers, "__init__", flat)
    assert min(alike(drawn(2_000, 2), site) for site in ("a", "b")) < 1e-6


def test_rounds_reach_a_narrow_posterior_with_the_simulations_that_were_asked_for(monkeypatch):
    """A posterior a thousandth as wide as the prior, of a plain function: mean and sd, and how often the function ran."""
    monkeypatch.setattr(ROUNDS, "_ROUND", 1)
    ran = []

    def measured(mu, rng):
        ran.append(mu)
        return rng.normal(mu, 0.1)

    model = dgm.as_model(measured, prior={"mu": dist.Normal(0.0, 100.0)})
    guide = dgm.AmortizedGuide(model, observed=["x"], ensemble=1)
    before = len(ran)
    found = dgm.rounds(guide, {"x": torch.tensor(20.0)}, 450, most=3, progress=False, seed=0)
    assert 450 <= len(ran) - before <= 550  # and a few, to look at the model
    draws = found.posterior.sample((4_000,))["mu"]
    assert abs(float(draws.mean()) - 20.0) < 0.05 and abs(float(draws.std()) / 0.1 - 1.0) < 0.3
    assert found.shares[0] == 1.0 and found.shares[-1] < 0.02 and list(found.shares) == sorted(found.shares)[::-1]
    assert found.trained_on[0] == 150 and found.trained_on[-1] == len(found.simulations) <= 450
    assert "rounds; trained on simulations, old and new, in a share of the prior: 150 in 1, " in str(found)
    assert not bool(guide.standardized)


def test_rounds_end_where_a_region_stays_as_it_is(monkeypatch):
    """Data that say nothing: the third round draws all that is left."""
    monkeypatch.setattr(ROUNDS, "_ROUND", 1)

    def model(x=None):
        pyro.sample("mu", dist.Uniform(0.0, 1.0))
        return pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = dgm.AmortizedGuide(model, observed=["x"], ensemble=1)
    found = dgm.rounds(guide, {"x": torch.tensor(0.0)}, 300, most=6, progress=False, seed=0)
    assert found.trained_on[0] == 50 and len(found.shares) == 3 and min(found.shares) > 0.5


def test_rounds_refuse_what_they_cannot_do():
    guide = dgm.AmortizedGuide(skewed, observed=["x"])
    with pytest.raises(ValueError, match="many data sets"):
        dgm.rounds(guide, {"x": torch.zeros(3, 2)}, 100, progress=False)
    with pytest.raises(ValueError, match="was trained before"):
        dgm.rounds(posterior().guide, DATA, 100, progress=False)

    def scaled(s, x=None):
        with pyro.plate("row", 3):
            return pyro.sample("x", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)), s), obs=x)

    guide = dgm.AmortizedGuide(scaled, observed=["x"], args=(torch.ones(3),), covariates=["s"])
    with pytest.raises(ValueError, match=r"covariates \['s'\] differ between data sets"):
        dgm.rounds(guide, {"x": np.zeros(3)}, 100, progress=False)
