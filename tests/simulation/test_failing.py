"""Simulations that fail: how many, with which parameters, which posterior the others teach, and how it is corrected."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm

EDGE, FAILING, SD = 0.5, 0.8, 0.3


def simulator(theta, rng):
    """Above the edge four of five runs fail, half of them by an error."""
    if theta > EDGE and rng.random() < FAILING:
        if rng.random() < 0.5:
            raise FloatingPointError("diverged")
        return np.nan
    return theta + SD * rng.normal()


MODEL = dgm.as_model(simulator, prior={"theta": dist.Uniform(0.0, 1.0)}, observed="x")


@pytest.fixture(scope="module")
def sims():
    with pytest.warns(UserWarning, match=r"\d+ of 4000 simulations failed and were left out \(\d+\.\d%: .*succeeds"):
        return dgm.simulate(MODEL, 4_000, observed=["x"], seed=0, progress=False)


def exact(x, success):
    """Share of the posterior above the edge; the prior is multiplied by the probability of success, or not."""
    t = torch.linspace(0.0, 1.0, 2_001)
    p = dist.Normal(t, SD).log_prob(torch.tensor(x)).exp()
    p = torch.where(t > EDGE, p * (1.0 - FAILING), p) if success else p
    return float(p[t > EDGE].sum() / p.sum())


def test_the_parameters_that_failed_are_kept(sims, tmp_path):
    """Planted: rows that raised have no parameters, which was so. Their share above the edge is one, and their number fits."""
    failed = sims.failed_latents["theta"]
    assert len(failed) == len(sims.failed) == 4_000 - len(sims) and bool((failed > EDGE).all())
    assert abs(len(failed) / 4_000 - FAILING * (1 - EDGE)) < 5 * (0.4 * 0.6 / 4_000) ** 0.5
    assert set(sims.reasons) == {"FloatingPointError: diverged", "site 'x' is not finite"}
    sims.save(tmp_path / "sims.pt")
    assert torch.equal(dgm.Simulations.load(tmp_path / "sims.pt").failed_latents["theta"], failed)


def test_what_is_learned_is_the_posterior_of_runs_that_succeed(sims):
    """Planted: the prior alone. And weights 1 / P(success), from a learned ratio, give that of a world without failures."""
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(MODEL, ["x"], ensemble=1)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=1_600, progress=False, seed=0)
    succeeded, failed = sims["theta"], sims.failed_latents["theta"]
    ratio = dgm.DensityRatio(1)
    everything = torch.cat([succeeded, failed])
    rows = torch.stack([succeeded[torch.randint(len(succeeded), (4_000,))], everything], 1)[..., None]
    dgm.fit(dgm.LogisticRegression(ratio), (rows[:, 0], rows[:, 1]), max_steps=600, progress=False, seed=0)
    for x in (0.3, 0.5, 0.8):
        near = 0.5 * (exact(x, success=False) - exact(x, success=True))  # nearer to its own law than to the other
        draws = guide.condition(x=torch.tensor(x)).sample((8_000,))["theta"]
        above = (draws > EDGE).double()
        assert abs(float(above.mean()) - exact(x, success=True)) < near
        with torch.no_grad():
            weights = (-ratio(draws[:, None])).exp().double()
        assert abs(float((weights * above).sum() / weights.sum()) - exact(x, success=False)) < near


def test_parameters_of_a_vectorised_model_that_fails_are_kept():
    def model(x=None):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        mean = torch.where(t > 1.0, torch.nan, t)
        return pyro.sample("x", dist.Normal(mean, 1.0, validate_args=False), obs=x)

    with pytest.warns(UserWarning, match="failed and were left out"):
        sims = dgm.simulate(model, 2_000, observed=["x"], seed=0, progress=False)
    assert bool((sims.failed_latents["t"] > 1.0).all()) and len(sims.failed_latents["t"]) == len(sims.failed)
    assert not dgm.simulate(model, 1, observed=["x"], seed=3, progress=False).failed_latents


def test_parameters_that_belong_to_no_failed_run_are_refused():
    with pytest.raises(ValueError, match=r"failed_latents have shapes {'t': \(3,\)}, expected tensors of 0 rows"):
        dgm.Simulations({"t": torch.zeros(5), "x": torch.zeros(5)}, ["x"], failed_latents={"t": torch.zeros(3)})


def test_refinement_where_part_of_the_prior_has_no_data():
    """The posterior of N(0, 1) below 1 and x ~ N(t, 1). Planted: a draw of the prior that fails ends it, which was so."""

    def model(x=None):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(torch.where(t > 1.0, torch.nan, t), 1.0), obs=x)

    with pytest.warns(UserWarning, match="failed and were left out"):
        sims = dgm.simulate(model, 1_000, observed=["x"], seed=0, progress=False)
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(model, ["x"])
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=200, progress=False, seed=0)
    refined = guide.condition(x=torch.tensor(2.0)).refine(1_000, seed=2)
    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(2.0)) + math.log(0.5)  # half of N(1, 1/2)
    assert bool((refined["t"] <= 1.0).all()) and abs(refined.log_evidence - evidence) < 5 * refined.log_evidence_error


def test_what_was_never_drawn_is_not_a_number(tmp_path):
    def model(x=None):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        if float(t) > 0.5:
            raise RuntimeError("early")
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(t + u, 1.0), obs=x)

    with pytest.warns(UserWarning):
        sims = dgm.simulate(model, 60, observed=["x"], seed=0, progress=False, path=tmp_path / "runs")
    assert bool((sims.failed_latents["t"] > 0.5).all()) and bool(sims.failed_latents["u"].isnan().all())
    assert "x" not in sims.failed_latents
