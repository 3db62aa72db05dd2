"""Units of amortised guides: covariates and data as they stand, and latents with long tails."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.amortized.structure import read
from pyro_dgm.amortized.units import Units


def regression(year=None, y=None):
    """A slope per ten years."""
    year = torch.linspace(1990.0, 2024.0, 8) if year is None else year
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", year.shape[-1]):
        mean = slope.unsqueeze(-1) * (year - 2007.0) / 10.0 if slope.dim() else slope * (year - 2007.0) / 10.0
        return pyro.sample("y", dist.Normal(101325.0 + 900.0 * mean, 900.0), obs=y)


def test_streams_and_covariates_have_units():
    """Planted: raw covariates are 2,000 units away from the origin."""
    guide = dgm.AmortizedGuide(
        regression, observed=["y"], covariates=["year"], args=(torch.linspace(1990.0, 2024.0, 8),)
    )
    year = 1990.0 + 34.0 * torch.rand(2000, 8)
    slope = torch.randn(2000)
    y = 101325.0 + 900.0 * (slope[:, None] * (year - 2007.0) / 10.0 + torch.randn(2000, 8))
    guide.standardize({"slope": slope, "year": year, "y": y})
    streams = guide.streams({"year": year, "y": y}, 1)
    assert all(s.features.abs().max() < 8 for s in streams)
    numbers = streams[0].features.reshape(-1, streams[0].features.shape[-1])
    assert ((numbers.std(0) - 1.0).abs() < 0.2).sum() == 2  # y and the year


def test_latents_with_long_tails_keep_their_density():
    """The log-determinants are those of autograd. Planted: scale alone, without the compression."""

    def model(x=None):
        a = pyro.sample("a", dist.Cauchy(0.0, 100.0))
        b = pyro.sample("b", dist.Normal(50.0, 3.0))
        return pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    torch.manual_seed(0)
    units = Units(read(model, ["x"], (), {}).latents)
    values = {"a": dist.Cauchy(0.0, 100.0).sample((3000,)), "b": 50.0 + 3.0 * torch.randn(3000)}
    units.fit(values, None, {})
    assert not units.standard.is_straight()
    u, log_det = units.flatten(values)
    assert u.abs().max() < 8
    back, log_dets = units.unflatten(u)
    torch.testing.assert_close(back["a"], values["a"], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(sum(log_dets.values()), -log_det, rtol=1e-4, atol=1e-3)
    one = u[7].double().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(
        lambda v: torch.stack(list(units.double().unflatten(v)[0].values())), one
    )
    torch.testing.assert_close(jacobian.slogdet()[1].float(), -log_det[7], rtol=1e-3, atol=1e-3)


def test_data_that_are_drawn_as_exponentials_are_read_in_logarithms():
    """The guide of LogNormal data is that of normal logarithms; planted fault: data read as they are. Zeros stay finite."""

    def logarithms(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        return pyro.sample("y", dist.Normal(mu[..., None] + torch.zeros(3), 0.5).to_event(1), obs=y)

    def positive(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        return pyro.sample("y", dist.LogNormal(mu[..., None] + torch.zeros(3), 0.5).to_event(1), obs=y)

    sims = dgm.simulate(logarithms, 500, observed=["y"], seed=0, progress=False)
    found = []
    for model, put in ((logarithms, lambda y: y), (positive, torch.exp)):
        torch.manual_seed(0)
        guide = dgm.AmortizedGuide(model, observed=["y"], ensemble=1)
        data = dgm.Simulations({"mu": sims["mu"], "y": put(sims["y"])}, ["y"])
        dgm.fit(dgm.ForwardKL(guide), data, max_steps=20, progress=False, seed=0)
        found.append(
            guide.condition(y=put(torch.tensor([1.0, 2.0, 0.5]))).log_prob({"mu": torch.linspace(-1.0, 3.0, 9)})
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)
    with pytest.warns(UserWarning, match="outside of the range"):
        draws = guide.condition(y=torch.tensor([0.0, 1.0, 2.0])).sample((9,))["mu"]
    assert bool(draws.isfinite().all())
