"""Small models whose posteriors are known: a normal, groups, a box, classes."""

import pyro
import pyro.distributions as dist
import torch


def normal(x=None):
    """mu | x is N(x / 2, 1 / 2), and x is N(0, 2)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def groups(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 5):
        theta = pyro.sample("theta", dist.Normal(mu, 0.7))
        return pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def boxed(x=None):
    """A uniform prior whose posterior, N(x, 0.3) cut off, touches the edges."""
    t = pyro.sample("t", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
    return pyro.sample("x", dist.Normal(t, 0.3).to_event(1), obs=x)


def kinds(x=None):
    z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    return pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
