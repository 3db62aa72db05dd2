"""Chains with the guide as their proposal: modes that it lacks are found and weighed, and chains that disagree are told."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_dgm as dgm
from pyro_dgm.diagnostics.explore import _split_rhat
from pyro_dgm.diagnostics.loo import elpd_of

PLACES = torch.tensor([[-6.0, 0.0, 0.0], [6.0, 2.0, -3.0], [1.0, -8.0, 5.0]])
SDS = torch.tensor([[0.5, 1.0, 1.0], [1.0, 0.5, 1.5], [1.0, 1.0, 0.7]])
WEIGHTS = torch.tensor([0.6, 0.3, 0.1])


def three_modes():
    """The density of a mixture, whatever the prior that the climbers start from."""
    prior = dist.Normal(torch.zeros(3), 6.0).to_event(1)
    x = pyro.sample("x", prior)
    mixture = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(PLACES, SDS).to_event(1))
    pyro.factor("f", mixture.log_prob(x) - prior.log_prob(x))


def at_one_mode():
    """A guide that is right at the first of three modes and knows no other."""
    pyro.set_rng_seed(0)
    guide = dgm.AutoFlow(three_modes).setup()
    guide._posterior.components[0].whiten(PLACES[0], SDS[0].diag())
    return guide


OPTIONS = {"seed": 0, "progress": False, "log_likelihood": False, "posterior_predictive": False, "container": "dict"}


@pytest.fixture(scope="module")
def found():
    return dgm.explore(three_modes, at_one_mode(), num_samples=80, rounds=1, **OPTIONS)


def test_lost_modes_are_found_and_weighed(found):
    """Planted: two modes of three that the guide lacks, with .4 of the mass."""
    x = torch.as_tensor(found.idata["groups"]["posterior"]["x"]).flatten(0, 1)
    cell = torch.cdist(x, PLACES).argmin(1)
    share = torch.bincount(cell, minlength=3) / len(x)
    assert found.guide.modes == 3 and float((share - WEIGHTS).abs().max()) < 0.03
    for k in range(3):
        assert float(((x[cell == k].mean(0) - PLACES[k]) / SDS[k]).abs().max()) < 0.2
        assert float((x[cell == k].std(0) / SDS[k]).log().abs().max()) < 0.15
    exact = WEIGHTS.sort().values.tolist()
    assert all(abs(w - e) < 4 * s for (w, s), e in zip(sorted(found.modes), exact, strict=True))


def test_what_is_known_is_said(found):
    assert found.rhat < 1.03 and found.jumps > 0.5 and found.moves > 0.5
    assert "R-hat" in str(found) and "weights of the modes" in str(found)


def test_the_better_guide_is_good_and_the_given_one_stays():
    guide = at_one_mode()
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    found = dgm.explore(three_modes, guide, num_samples=4, rounds=1, **OPTIONS)
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())
    options = {"prior": 0, "seed": 0, "container": "dict"}
    assert dgm.khat(dgm.from_svi(three_modes, guide, **options)).other_modes > 0
    better = dgm.khat(dgm.from_svi(three_modes, found.guide, **options))
    assert better.status == "good" and better.other_modes == 0 and abs(better.log_evidence) < 0.05


def test_leave_one_out_takes_the_draws_of_chains_as_they_are():
    """A normal mean of four data, elpd in closed form. Planted: a refusal for want of the guide's density, which was so."""
    y = torch.tensor([0.2, 0.9, -0.4, 1.5])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    found = dgm.explore(model, dgm.AutoFlow(model).setup(y), y, rounds=1, seed=0, progress=False)
    rest = [y[torch.arange(4) != i] for i in range(4)]
    exact = sum(dist.Normal(r.sum() / 4, 1.25**0.5).log_prob(y[i]) for i, r in enumerate(rest))
    assert abs(float(elpd_of(dgm.loo(found.idata))) - float(exact)) < 0.05


def test_chains_that_do_not_agree_are_told():
    """Planted: one chain of 16 at another place, and one of another width."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(16, 100))
    assert _split_rhat(draws) < 1.01
    moved, wide = draws.copy(), draws.copy()
    moved[0] += 1.5
    wide[0] *= 4.0
    assert _split_rhat(moved) > 1.03 and _split_rhat(wide) > 1.03


def groups(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def test_what_cannot_be_explored_is_refused():
    with pytest.raises(TypeError, match="no AutoFlow"):
        dgm.explore(three_modes, AutoNormal(three_modes))
    y = torch.randn(60)
    with pytest.raises(ValueError, match="follows plates"):
        dgm.explore(groups, dgm.AutoFlow(groups).setup(y), y, progress=False)
