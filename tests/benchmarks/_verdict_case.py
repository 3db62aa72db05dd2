"""What a posterior of the bench of verdicts is made of, and regressions of several kinds."""

from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import torch


@dataclass
class Case:
    """A model and its data; wrong ones; exact draws by site and the places of modes; what else may be planted.

    Attributes:
        others: ``{kind of fault: (model, args)}``.
        single: whether a fit in float32 is a fault that is tried.
        stock: whether Pyro's own mean field knows the latents: it does not leave out those that are summed over.
        block: a site that a guide may not know.
    """

    model: object
    args: tuple = ()
    others: dict = field(default_factory=dict)
    exact: dict | None = None
    places: np.ndarray | None = None
    single: bool = False
    stock: bool = True
    block: str = ""


# --- Regressions ---

LIKELIHOODS = {
    "normal": lambda eta, s: dist.Normal(eta, s),
    "student": lambda eta, s: dist.StudentT(2.5, eta, s),
    "logistic": lambda eta, s: dist.Bernoulli(logits=eta),
    "probit": lambda eta, s: dist.Bernoulli(probs=dist.Normal(0.0, 1.0).cdf(eta).clamp(1e-6, 1.0 - 1e-6)),
    "poisson": lambda eta, s: dist.Poisson(eta.clamp(-20.0, 20.0).exp()),
    "overdispersed": lambda eta, s: dist.GammaPoisson(2.0, 2.0 / eta.clamp(-20.0, 20.0).exp()),
    "exponential": lambda eta, s: dist.Exponential(eta.clamp(-20.0, 20.0).exp()),
    "gamma": lambda eta, s: dist.Gamma(3.0, 3.0 * eta.clamp(-20.0, 20.0).exp()),
    "lognormal": lambda eta, s: dist.LogNormal(eta.clamp(-20.0, 20.0), s),
    "weibull": lambda eta, s: dist.Weibull(eta.clamp(-20.0, 20.0).exp(), s),
}


def glm(kind, prior=1.5, centre=0.0):
    def model(x, y):
        d = x.shape[-1]
        b = pyro.sample("b", dist.Normal(torch.full((d,), centre), prior).to_event(1))
        s = (
            pyro.sample("s", dist.HalfNormal(1.0))
            if kind in ("normal", "student", "lognormal", "weibull")
            else torch.ones(())
        )
        with pyro.plate("row", len(y)):
            pyro.sample("y", LIKELIHOODS[kind]((b * x).sum(-1), s), obs=y)

    return model


def changed(y, share=0.4):
    """The data before so many rows came to be what they are: those rows in another order."""
    n = int(share * len(y))
    return torch.cat([y[:n].roll(max(1, n // 3), 0), y[n:]])
