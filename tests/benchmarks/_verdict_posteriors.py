"""Posteriors of the bench of verdicts, each cheap to fit: families with a seed for their data, and what a guide may be fitted to instead.

A case's ``others`` are models and data that differ from it by one mistake: data of before a change (``stale data``), the first
rows (``a subsample``), another prior, another likelihood. A guide fitted to these is judged on the case.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import torch

from tests.benchmarks import _verdict_laws as laws
from tests.benchmarks import supports
from tests.benchmarks._verdict_case import LIKELIHOODS, Case, changed, glm

# --- Regressions ---


def regression(kind, d, rows, other, alike=0.0):
    """Columns of which each is ``alike`` the first; an intercept beside them."""
    x = torch.randn(rows, d)
    x = torch.cat([torch.ones(rows, 1), x[:, :1], alike * x[:, :1] + (1.0 - alike**2) ** 0.5 * x[:, 1:]], 1)[:, : d + 1]
    b = torch.linspace(0.8, -0.8, d + 1)
    y = LIKELIHOODS[kind]((b * x).sum(-1), torch.tensor(0.8)).sample()
    model, half = glm(kind), rows // 2
    others = {"stale data": (model, (x, changed(y))), "a subsample": (model, (x[:half], y[:half])),
              "wrong prior": (glm(kind, 0.5, 1.0), (x, y)), "another model": (glm(other), (x, y))}  # fmt: skip
    return Case(model, (x, y), others, block="b" if kind == "normal" else "")


# --- A few numbers ---


def located(scale=1.0, tails=False):
    def model(y):
        mu, s = pyro.sample("mu", dist.Normal(0.0, 5.0 * scale)), pyro.sample("s", dist.HalfCauchy(2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.StudentT(2.5, mu, s) if tails else dist.Normal(mu, s), obs=y)

    return model


def few():
    y = 1.0 + 2.0 * torch.randn(6)
    return Case(located(), (y,), {"stale data": (located(), (y + torch.tensor([0.0, 0.0, 0.0, 0.0, 4.0, 4.0]),)),
                "a subsample": (located(), (y[:4],)), "wrong prior": (located(0.2), (y,)),
                "another model": (located(tails=True), (y,))})  # fmt: skip


def gammas(shape_prior=2.0):
    def model(y):
        a, r = pyro.sample("a", dist.HalfNormal(shape_prior)), pyro.sample("r", dist.HalfNormal(3.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Gamma(a, r), obs=y)

    return model


def gamma():
    y = dist.Gamma(1.5, 1.0).sample((20,)).clamp_min(1e-3)
    return Case(gammas(), (y,), {"stale data": (gammas(), (torch.cat([y[:14], 2.0 * y[14:]]),)),
                "a subsample": (gammas(), (y[:10],)), "wrong prior": (gammas(0.5), (y,))})  # fmt: skip


def proportions(top=3.0):
    def model(n):
        mean, size = pyro.sample("mean", dist.Beta(2.0, 2.0)), pyro.sample("size", dist.LogNormal(top, 1.0))
        with pyro.plate("row", len(n)):
            pyro.sample("n", dist.BetaBinomial(mean * size, (1.0 - mean) * size, 20), obs=n)

    return model


def shares():
    n = dist.BetaBinomial(3.0, 6.0, 20).sample((15,))
    return Case(proportions(), (n,), {"stale data": (proportions(), (changed(n, 0.5) + (n < 10) * 2.0,)),
                "a subsample": (proportions(), (n[:7],)), "wrong prior": (proportions(0.5), (n,))})  # fmt: skip


# --- Groups ---


def grouped(centred=True, width=5.0, tails=False):
    def model(sigma, y):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(width))
        with pyro.plate("group", len(y)):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.StudentT(3.0, theta, sigma) if tails else dist.Normal(theta, sigma), obs=y)

    return model


def schools(centred, groups=8, spread=6.0):
    sigma = 9.0 + 9.0 * torch.rand(groups)
    y = 4.0 + spread * torch.randn(groups) + sigma * torch.randn(groups)
    model = grouped(centred)
    return Case(model, (sigma, y), {"stale data": (model, (sigma, changed(y, 0.6))), "wrong prior": (grouped(centred, 0.5), (sigma, y)),
                "another model": (grouped(centred, tails=True), (sigma / 2.0, y))})  # fmt: skip


def well_known_groups():
    """Ten groups that the data know well: no funnel is left."""
    return schools_of(10, 12.0, 4.0)


def schools_of(groups, spread, error):
    sigma = error * (0.5 + torch.rand(groups))
    y = 4.0 + spread * torch.randn(groups) + sigma * torch.randn(groups)
    model = grouped(True)
    return Case(
        model,
        (sigma, y),
        {"stale data": (model, (sigma, changed(y, 0.6))), "wrong prior": (grouped(True, 0.3), (sigma, y))},
    )


def counted(prior=2.0):
    def model(exposure, y):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, prior)), pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("group", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson((mu + tau * eta).clamp(-15.0, 15.0).exp() * exposure), obs=y)

    return model


def counts():
    exposure = 1.0 + 4.0 * torch.rand(8)
    y = dist.Poisson((0.5 + 0.7 * torch.randn(8)).exp() * exposure).sample()
    return Case(counted(), (exposure, y), {"stale data": (counted(), (exposure, changed(y, 0.6))),
                "wrong prior": (counted(0.1), (exposure, y)), "another model": (counted(), (torch.ones(8), y))})  # fmt: skip


def of_supports(make, stale=True):
    """A model of the bench of supports, with some of its last data in another order."""
    model, args, exact = make()
    others = {"stale data": (model, (*args[:-1], changed(args[-1], 0.7)))} if stale else {}
    known = exact if isinstance(exact, dict) else None
    stock = make is not supports.enumerated_mixture
    return Case(model, tuple(args), others, known, single=make is supports.unscaled, stock=stock)


# --- Series ---


def autoregressive(order):
    def model(y):
        phi = pyro.sample("phi", dist.Normal(torch.zeros(order), 0.7).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        lagged = torch.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], -1)
        with pyro.plate("time", len(y) - order):
            pyro.sample("y", dist.Normal((phi * lagged).sum(-1), s), obs=y[order:])

    return model


def series():
    y = torch.zeros(60)
    for t in range(2, 60):
        y[t] = 0.9 * y[t - 1] - 0.4 * y[t - 2] + 0.5 * torch.randn(())
    model = autoregressive(2)
    return Case(
        model,
        (y,),
        {
            "stale data": (model, (y.flip(0),)),
            "a subsample": (model, (y[:30],)),
            "a gap in the data": (model, (y[::2],)),
        },
    )


def level(width=0.5):
    def model(y):
        s = pyro.sample("s", dist.HalfNormal(width))
        step = pyro.sample("step", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
        x = (s[..., None] * step).cumsum(-1)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    return model


def walk():
    y = 0.4 * torch.randn(15).cumsum(0) + 0.5 * torch.randn(15)
    return Case(level(), (y,), {"stale data": (level(), (y.flip(0),)), "wrong prior": (level(0.05), (y,))})


SEEDED = {
    "normal regression": partial(regression, "normal", 3, 30, "student"),
    "student regression": partial(regression, "student", 4, 40, "normal"),
    "alike columns": partial(regression, "normal", 2, 40, "student", 0.97),
    "logistic": partial(regression, "logistic", 3, 60, "probit"),
    "logistic, few rows": partial(regression, "logistic", 2, 12, "probit"),
    "logistic, 9": partial(regression, "logistic", 8, 120, "probit"),
    "poisson": partial(regression, "poisson", 3, 40, "overdispersed"),
    "overdispersed": partial(regression, "overdispersed", 2, 40, "poisson"),
    "exponential": partial(regression, "exponential", 3, 25, "gamma"),
    "weibull": partial(regression, "weibull", 2, 25, "lognormal"),
    "few numbers": few,
    "gamma": gamma,
    "shares": shares,
    "schools, centred": partial(schools, True),
    "schools, not centred": partial(schools, False),
    "known groups": well_known_groups,
    "counts of groups": counts,
    "nested groups": partial(of_supports, supports.hierarchy),
    "enumerated mixture": partial(of_supports, supports.enumerated_mixture),
    "ordered": partial(of_supports, supports.ordered),
    "correlation": partial(of_supports, supports.correlation),
    "autoregression": series,
    "walk": walk,
    "angles": laws.angles,
    "modes: 2 of 2": partial(laws.modes, 2, 2),
    "modes: 3 of 4": partial(laws.modes, 3, 4),
    "modes: 2 of 8": partial(laws.modes, 2, 8),
    "sign": laws.sign,
    "generator": laws.generator,
    "normal law: 5": partial(laws.normal_law, 5, 100.0),
}
ONCE = {
    "simplex": partial(of_supports, supports.simplex),
    "rates": partial(of_supports, supports.counts),
    "interval": partial(of_supports, supports.interval, False),
    "growth": partial(of_supports, supports.ordinary_differential_equation),
    "unscaled": partial(of_supports, supports.unscaled),
    "normal law: 20": partial(laws.normal_law, 20, 1000.0),
    "student: 3": partial(laws.student, 3),
    "funnel: 4": partial(laws.funnel, 4, 1.5),
    "funnel: 10": partial(laws.funnel, 10, 2.0),
    "banana": partial(laws.banana, 0.7),
    "bent banana": partial(laws.banana, 1.5),
    "skewed": laws.skewed,
    "flow prior": laws.flow_prior,
    "normal groups: 60": partial(laws.many_groups, "normal", 60),
    "counts of groups: 80": partial(laws.many_groups, "poisson", 80),
    "trials of groups: 60": partial(laws.many_groups, "binomial", 60),
    "level: 80 times": partial(laws.many_times, "level", 80),
    "volatility: 80 times": partial(laws.many_times, "volatility", 80),
    "slopes: 60": partial(laws.many_slopes, 60),
    "normal law: 60": partial(laws.normal_law, 60, 100.0),
}


def names():
    return [f"{name} {seed}" for name in SEEDED for seed in (0, 1)] + list(ONCE)


def made(name):
    """A case, its data by the seed behind its name."""
    family, _, seed = name.rpartition(" ")
    if name in ONCE:
        family, seed = name, "0"
    pyro.set_rng_seed(100 + int(seed))
    return (SEEDED | ONCE)[family]()
