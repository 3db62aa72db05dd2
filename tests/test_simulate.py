"""Simulations against their law, whatever runs them: together, one by one, in processes, on disk, after a kill."""

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm


def groups(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("group", 4):
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(t, 0.5), obs=y)


def drawn(model, n=2_000, **options):
    return dgm.simulate(model, n, **({"observed": ["y"], "seed": 0, "progress": False} | options))


def test_moments_are_those_of_the_joint():
    """Var y = 4 + 1 + 1/4 and the covariance of two groups is 4, within 5 errors; a mean shared by draws would show in both."""
    y = drawn(groups, 20_000)["y"]
    products = torch.stack([y[:, 0].square(), y[:, 0] * y[:, 1]])
    error = products.std(1) / len(y) ** 0.5
    assert ((products.mean(1) - torch.tensor([5.25, 4.0])).abs() < 5 * error).all()


def test_draws_do_not_depend_on_the_batch_size():
    a, b = drawn(groups, 2_500), drawn(groups, 2_500, batch_size=2_000)
    assert all(torch.equal(a[k], b[k]) for k in ("mu", "t", "y")) and len(a["mu"].unique()) == 2_500
