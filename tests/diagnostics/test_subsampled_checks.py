"""Checks that need one density get one, where the model's plates are subsampled: all rows, a subsample at a time."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.diagnostics.short_chains import look_around
from pyro_dgm.model.log_joint import LogJoint

ROWS = 40
X = torch.linspace(-1.0, 3.0, ROWS)
PRECISION = ROWS + 0.01
POSTERIOR = dist.Normal(X.sum() / PRECISION, PRECISION**-0.5)
EVIDENCE = (
    dist.MultivariateNormal(torch.zeros(ROWS).double(), torch.eye(ROWS).double() + 100.0).log_prob(X.double()).item()
)


def in_plates(x, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x), subsample_size=size) as i:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[i])


def not_broadcasting(x, size=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=size) as i:
        pyro.sample("x", dist.Normal(torch.stack([x[i], x[i] ** 2], -1) @ w, 1.0), obs=x[i])


def singly(x, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    shift = float(mu) if mu.dim() == 0 else 0.0
    with pyro.plate("data", len(x), subsample_size=size) as i:
        pyro.sample("x", dist.Normal(mu + 0.0 * shift, 1.0 + (shift > 100.0)), obs=x[i])


def mixture(x, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x), subsample_size=size) as i:
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(mu + z, 1.0), obs=x[i])


@pytest.mark.parametrize("size", [20, 16, 7, 39])
@pytest.mark.parametrize("model", [in_plates, not_broadcasting, singly, mixture])
@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_the_whole_density_is_that_of_the_full_data(model, size):
    """At every call the same, with its gradient. Planted faults: a fresh subsample; rows of the last round counted twice."""
    guide = dgm.AutoFlow(model).setup(X)
    u = torch.randn(3, guide.latent_dim)
    full, grad = LogJoint(guide, model, (X,), {}).value_and_grad(u)
    whole = LogJoint(guide, model, (X, size), {}, whole=True)
    for _ in range(2):
        value, slope = whole.value_and_grad(u)
        torch.testing.assert_close(value, full, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(slope, grad, rtol=1e-3, atol=1e-2)


def placed(loc, scale):
    """A guide of the mean that is normal."""
    guide = dgm.AutoFlow(in_plates).setup(X, 10)
    guide._posterior.components[0].whiten(loc.reshape(1), torch.as_tensor(scale).reshape(1, 1))
    return guide


@pytest.mark.parametrize(
    "shift, stretch, status", [(0.0, 1.0, "good"), (0.05, 1.05, "good"), (0.4, 1.0, "usable"), (0.0, 1.4, "usable")]
)
def test_the_verdict_on_a_subsampled_model(shift, stretch, status):
    """Good below .1 sd of error, usable above. Before: the chains met another subsample at each step, and left the posterior."""
    guide = placed(POSTERIOR.loc + shift * POSTERIOR.scale, stretch * POSTERIOR.scale)
    idata = dgm.from_svi(in_plates, guide, X, 10, num_samples=2_000, prior=0, seed=0)
    verdict = dgm.khat(idata)
    assert verdict.status in {"good": ("good", "exact"), "usable": ("usable",)}[status], str(verdict)
    assert abs(verdict.log_evidence - EVIDENCE) < 0.02 and not verdict.unseen


def test_nuts_samples_the_posterior_of_the_full_data():
    guide = placed(POSTERIOR.loc + 0.02, 1.2 * POSTERIOR.scale)
    options = {"num_samples": 300, "warmup_steps": 50, "num_chains": 1, "seed": 0, "progress": False}
    mu = dgm.neutra(in_plates, guide, X, 20, **options)["posterior"]["mu"].values.ravel()
    assert abs(mu.mean() - float(POSTERIOR.loc)) < 0.4 * float(POSTERIOR.scale)
    assert abs(mu.std() / float(POSTERIOR.scale) - 1.0) < 0.3


def test_what_was_not_looked_at_is_said():
    """A pass of 40 runs for one density is too dear; a guide without a vector; a check that was not asked for."""
    guide = placed(POSTERIOR.loc, POSTERIOR.scale)
    assert "takes 40 runs of the model" in look_around(in_plates, guide, (X, 1), {}).unseen
    verdict = dgm.khat(dgm.from_svi(in_plates, guide, X, 1, num_samples=200, prior=0, seed=0))
    assert "No short MCMC was run and no modes were looked for: a pass over the subsampled plate" in str(verdict)
    verdict = dgm.khat(dgm.from_svi(in_plates, guide, X, 10, num_samples=200, prior=0, seed=0, check=False))
    assert verdict.unseen == "it was not asked for"
    normal = pyro.infer.autoguide.AutoNormal(in_plates)
    verdict = dgm.khat(dgm.from_svi(in_plates, normal, X, num_samples=200, prior=0, seed=0))
    assert verdict.unmoved == "the guide has no vector of all latents" and "No short MCMC was run: the guide" in str(
        verdict
    )
