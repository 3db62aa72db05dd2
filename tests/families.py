"""The one table of constructors. Every contract test runs over all of it; a new family costs one row."""

import functools

import pyro.distributions as dist
import torch
from torch.distributions import Normal, constraints

import pyro_dgm as dgm
from pyro_dgm.core import MLP, zuko
from pyro_dgm.flows import MixtureChain


class Gaussian(dgm.DistributionModule):
    """The smallest family a user would write."""

    def __init__(self, features, context_features=0):
        super().__init__(features, context_features)
        self.net = MLP(context_features, 2 * features, (16,)) if context_features else None
        self.free = torch.nn.Parameter(0.1 * torch.randn(2 * features))

    def build(self, context):
        moments = self.free if context is None else self.free + 0.3 * self.net(context)
        loc, log_scale = moments.chunk(2, -1)
        return torch.distributions.Independent(Normal(loc, log_scale.exp()), 1)


def of_zuko(flow, **options):
    """``(features, context_features) -> ZukoFlow`` around a zuko class."""
    return lambda features, context_features=0: dgm.ZukoFlow(flow(features, context_features, **options))


small = {"hidden_features": (16, 16)}


def conditional(features, context_features=0):
    """A network in front of a Gaussian; without a context its parameters are free."""
    shared = () if context_features else ("loc", "log_scale")
    return dgm.vae.Conditional(features, context_features, dgm.vae.normal, hidden_features=(16,), shared=shared)


def chain(features, context_features=0):
    """One dimension after the other."""
    parts = [conditional(1, context_features + i) for i in range(features)]
    return dgm.vae.Chain(*parts, context_features=context_features)


# name -> (features, context_features) -> family over real vectors
FAMILIES = {
    "Gaussian": Gaussian,
    "RealNVP": functools.partial(dgm.RealNVP, transforms=4, **small),
    "MAF": functools.partial(dgm.MAF, transforms=2, **small),
    "MAF-sampling": functools.partial(dgm.MAF, transforms=2, fast="sampling", **small),
    "NSF": functools.partial(dgm.NSF, transforms=2, **small),
    "MixtureChain": functools.partial(MixtureChain, components=3, **small),
    "FFJORD": functools.partial(dgm.FFJORD, hidden_features=8, steps=6),
    "OTFlow": functools.partial(dgm.OTFlow, hidden_features=16, steps=6),
    "Conditional": conditional,
    "Chain": chain,
    "zuko-NICE": of_zuko(zuko.flows.NICE, **small),
    "zuko-NSF": of_zuko(zuko.flows.NSF, transforms=2, **small),
    "zuko-NCSF": of_zuko(zuko.flows.NCSF, transforms=2, **small),
    "zuko-SOSPF": of_zuko(zuko.flows.SOSPF, transforms=1, **small),
    "zuko-BPF": of_zuko(zuko.flows.BPF, transforms=2, **small),
    "zuko-NAF": of_zuko(zuko.flows.NAF, transforms=1, **small),
    "zuko-UNAF": of_zuko(zuko.flows.UNAF, transforms=1, **small),
    "zuko-GF": of_zuko(zuko.flows.GF, transforms=2, **small),
    "zuko-CNF": of_zuko(zuko.flows.CNF, **small),
    "zuko-GMM": of_zuko(zuko.mixtures.GMM, components=3),
}

# Families whose draws carry no gradient.
NOT_REPARAMETERISED = {"zuko-GMM"}
# Families that are no transform of a latent.
NO_TRANSFORM = {"Gaussian", "Conditional", "Chain", "MixtureChain", "zuko-GMM"}
# Families that invert by bisection or by an ODE solver: a round trip is exact to the solver only.
APPROXIMATE = {
    "FFJORD": 1e-3,
    "OTFlow": 1e-3,
    "zuko-SOSPF": 1e-3,
    "zuko-BPF": 1e-3,
    "zuko-NAF": 1e-3,
    "zuko-UNAF": 1e-3,
    "zuko-GF": 1e-2,
    "zuko-CNF": 1e-3,
}

# support, event shape: one family (MAF) is put on each
SUPPORTS = {
    "positive": (constraints.positive, (2,)),
    "unit_interval": (constraints.unit_interval, ()),
    "greater_than": (constraints.greater_than(3.0), (2, 2)),
    "simplex": (constraints.simplex, (3,)),
    "ordered": (dist.constraints.ordered_vector, (3,)),
    "lower_cholesky": (constraints.lower_cholesky, (2, 2)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
}


def make(name, features=2, context_features=0):
    """A family of the table, in a state like after some training: no parameter at its initial zero or identity.

    The unconditional GF of zuko starts with random centres far outside the interval where it can be inverted; it is
    brought inside, as fitting to standardised data does.
    """
    torch.manual_seed(1)
    family = FAMILIES[name](features, context_features)
    if name in ("zuko-GF", "zuko-SOSPF"):
        with torch.no_grad():
            for parameter in family.parameters():
                parameter.mul_(0.2)
    return family
