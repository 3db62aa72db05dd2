"""Masks that depend on a discrete value that is summed out: densities as in Pyro, and containers of such models."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_dgm as dgm
from pyro_dgm.diagnostics.containers import group
from pyro_dgm.model.program import Program

X = torch.tensor([0.4, 1.3, -0.2, 0.9, 2.1])
P = torch.tensor([0.2, 0.3, 0.5])


def of_a_global(x=X, values=3):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Categorical(torch.ones(values)), infer={"enumerate": "parallel"})
    with pyro.plate("row", len(X)), poutine.mask(mask=k > 0):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def of_as_many_values_as_rows(x=X):
    of_a_global(x, len(X))


def of_a_row(x=X):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(X)):
        k = pyro.sample("k", dist.Categorical(P), infer={"enumerate": "parallel"})
        with poutine.mask(mask=(k > 0) & (torch.arange(len(X)) != 1)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


MODELS = [of_a_global, of_as_many_values_as_rows, of_a_row]


@pytest.mark.parametrize("parallel", ["auto", True, False])
@pytest.mark.parametrize("model", MODELS)
def test_the_log_joint_is_that_of_trace_enum_elbo(model, parallel):
    """The guide has its mass at a point, where minus the loss is the log joint. Planted fault: a mask in the sum's place."""
    points = torch.tensor([-0.7, 0.1, 1.2])
    program = Program(model, None, (), {}, parallel, draws={"mu": points})
    lp = program.scored({"mu": points}, 3).total(3)
    at = [TraceEnum_ELBO().loss(model, lambda mu=mu: pyro.sample("mu", dist.Delta(mu))) for mu in points]
    torch.testing.assert_close(lp.float(), -torch.tensor(at), atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:from_svi. no log_likelihood")
@pytest.mark.parametrize("model", MODELS)
def test_the_container_has_all_groups(model):
    """What no value shows is hidden (row 1); what some value shows is a datum."""
    guide = AutoNormal(poutine.block(model, hide=["k"]))
    guide()
    idata = dgm.from_svi(model, guide, num_samples=40, prior=20, check=False, seed=0)
    assert group(idata, "posterior_predictive")["x"].shape == (1, 40, 5)
    assert group(idata, "posterior")["k"].size == 40 * (5 if model is of_a_row else 1)
    if model is of_a_row:
        mu = torch.as_tensor(group(idata, "posterior")["mu"])[..., None]
        seen = (P[0] + P[1:].sum() * dist.Normal(mu, 1.0).log_prob(X).exp()).log()
        got = torch.as_tensor(group(idata, "log_likelihood")["x"])
        torch.testing.assert_close(got.float(), seen[..., [0, 2, 3, 4]], atol=1e-5, rtol=1e-5)


def two_means(x=X):
    """No marks: NUTS sums z out by itself."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(X)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mu + 2.0 * z, 1.0), obs=x)


def test_what_nuts_sums_out_unmarked_is_drawn_from_its_posterior():
    """Planted fault: z from its prior; or refused, since it is not in the draws."""
    mcmc = MCMC(NUTS(two_means), num_samples=2_000, warmup_steps=100, disable_progbar=True)
    mcmc.run(X)
    new = ((torch.zeros(5),), {})
    idata = dgm.from_pyro_mcmc(mcmc, X, prior=20, seed=0, predictions=new)
    mu, z = (torch.as_tensor(group(idata, "posterior")[k])[0].float() for k in ("mu", "z"))
    ones, zeros = dist.Normal(mu[:, None] + 2.0, 1.0).log_prob(X), dist.Normal(mu[:, None], 1.0).log_prob(X)
    p = 1 / (1 + (zeros - ones).exp() * 0.7 / 0.3)
    assert ((z - p).mean(0).abs() < 5 * 0.5 / 2_000**0.5).all()
    rows = torch.logaddexp(ones + math.log(0.3), zeros + math.log(0.7))
    lp = torch.as_tensor(group(idata, "sample_stats")["lp"])[0].float()
    torch.testing.assert_close(lp, rows.sum(-1) + dist.Normal(0.0, 1.0).log_prob(mu), atol=1e-4, rtol=1e-5)
    got = torch.as_tensor(group(idata, "log_likelihood")["x"])[0].float()
    torch.testing.assert_close(got, rows, atol=1e-5, rtol=1e-5)
    assert group(idata, "predictions")["x"].shape == (1, 2_000, 5)
    assert "x" in group(idata, "predictions_constant_data")
