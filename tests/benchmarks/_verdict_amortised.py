"""Amortised guides on many data sets, and encoders by row: what the bench of verdicts asks of guides that learned all posteriors at once.

Of an amortised guide each data set is a fit; three guides are trained on the same model: on many simulations, on a hundred of them
learned by heart, and for some steps only; data sets are drawn as the simulations are, or from outside of their range.
Of a VAE with a linear decoder each row's posterior is known: the exact encoder, trained ones, and ones with a fault in all rows or some.
"""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
import pyro_dgm.vae as parts
from tests.benchmarks._verdict_case import Case
from tests.benchmarks._verdict_rivals import within_simulations
from tests.benchmarks._verdict_truth import FAULT, RIGHT, container, fitted, reference_of

INSIDE, OUTSIDE = 10, 5  # data sets
SIMULATIONS, HEART = 10_000, 100
DRAWS = 4_000  # of a row that is compared with its exact posterior


# --- Amortised guides ---


def located(y=None):
    """Ten numbers of unknown mean and scale."""
    mu, s = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("row", 10):
        return pyro.sample("y", dist.Normal(mu, s), obs=y)


def trend(y=None):
    """Counts over twelve times."""
    b = pyro.sample("b", dist.Normal(torch.tensor([1.0, 0.0]), torch.tensor([0.7, 0.5])).to_event(1))
    eta = b[..., :1] + b[..., 1:] * torch.linspace(-1.5, 1.5, 12)
    return pyro.sample("y", dist.Poisson(eta.clamp(-10.0, 8.0).exp()).to_event(1), obs=y)


def groups(y=None):
    """Five groups with known errors."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("group", 5):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


FAR = {
    "located": lambda y: 6.0 * y + 20.0,
    "trend": lambda y: ((y + 1.0) * torch.logspace(0.0, 2.0, 12)).round(),
    "groups": lambda y: 5.0 * y + 15.0,
}
MODELS = {"located": located, "trend": trend, "groups": groups}


def trained(model, simulations, **limits):
    guide = dgm.AmortizedGuide(model, observed=["y"], ensemble=1)
    dgm.fit(dgm.ForwardKL(guide), simulations, progress=False, seed=0, **limits)
    return guide


def guides(model, simulations):
    """By what is wrong with them."""
    some = {k: v[:HEART] for k, v in simulations.items()}
    return {"none": trained(model, simulations, max_steps=1_500), "overfitted": trained(model, some, max_steps=1_500),
            "stopped early": trained(model, simulations, max_steps=20)}  # fmt: skip


def amortised_fits(name):
    """Name of the posterior, kind, case with the data in it, guide, reference, and whether the data are within the simulations."""
    model = MODELS[name]
    simulations = dgm.simulate(model, SIMULATIONS, observed=["y"], seed=1, progress=False)
    by_kind = guides(model, simulations)
    fresh = dgm.simulate(model, INSIDE + OUTSIDE, observed=["y"], seed=2, progress=False)["y"]
    summary = lambda y: np.concatenate([y, y.mean(-1, keepdims=True), np.log(y.std(-1, keepdims=True) + 0.1)], -1)
    seen = summary(np.asarray(simulations["y"], dtype=float))
    for i, y in enumerate(fresh):
        y = y if i < INSIDE else FAR[name](y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            conditioned = {k: guide.condition(y=y) for k, guide in by_kind.items()}
        case = Case(conditioned["none"].model)
        like = fitted(case.model, ())
        with torch.no_grad():
            reference = reference_of(case, like)
        inside = within_simulations(seen, summary(np.asarray(y, dtype=float)[None]))
        for kind, guide in conditioned.items():
            label = "data out of range" if i >= INSIDE and kind == "none" else kind
            yield f"amortised {name} {i}", label, Case(guide.model), guide, like, reference, inside


# --- Encoders ---


class Rows:
    """A linear decoder, 60 rows of data, and their exact posteriors."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(3, 2, generator=generator)
        self.noise = 0.4 + 0.6 * float(torch.rand((), generator=generator))
        z = torch.randn(60, 2, generator=generator)
        self.x = z @ self.weight.T + self.noise * torch.randn(60, 3, generator=generator)
        self.cov = torch.linalg.inv(torch.eye(2) + self.weight.T @ self.weight / self.noise**2)
        self.encoder = self.cov @ self.weight.T / self.noise**2
        self.centre = torch.zeros(3)

    def model(self, x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.noise).to_event(1), obs=x)

    def guide(self, shift=0.0, scale=1.0, share=1.0, diagonal=False, encoder=1.0):
        tril = torch.linalg.cholesky(self.cov)
        if diagonal:
            tril = torch.diag(torch.linalg.inv(self.cov).diagonal().rsqrt())

        def guide(x):
            some = (torch.arange(len(x)) < share * len(x))[:, None]
            loc = x @ (encoder * self.encoder).T + torch.where(some, shift, 0.0) * self.cov.diagonal().sqrt()
            with pyro.plate("row", len(x)):
                spread = torch.where(some[..., None], scale, 1.0) * tril
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=spread))

        return guide


class Trained:
    """A VAE with a linear decoder and a normal encoder, both trained for so many steps, and the exact posteriors of its rows."""

    def __init__(self, rows, steps, hidden=()):
        self.x, noise = rows.x, rows.noise
        likelihood = parts.Conditional(3, 2, lambda loc: dist.Normal(loc, noise), network=torch.nn.Linear(2, 3))
        posterior = parts.Conditional(2, 3, parts.normal, hidden_features=hidden)
        vae = dgm.VAE(parts.StandardNormal(2), likelihood, posterior)
        dgm.fit(dgm.STL_ELBO(4)(vae.model, vae.guide), self.x, batch_size=60, max_steps=steps, progress=False, seed=0)
        vae.requires_grad_(False)
        self.model, self.guide = vae.model, vae.guide
        self.centre = vae.decode(torch.zeros(2)).mean
        weight = torch.stack([vae.decode(e).mean - self.centre for e in torch.eye(2)], -1)
        self.cov = torch.linalg.inv(torch.eye(2) + weight.T @ weight / noise**2)
        self.encoder = self.cov @ weight.T / noise**2


def faulty(seed):
    """Arguments of a guide by kind of fault, of other sizes for each seed."""
    return {"shifted": {"shift": 0.4 + 0.1 * seed}, "too narrow": {"scale": 0.7 - 0.05 * seed}, "too wide": {"scale": 1.4 + 0.1 * seed},
            "mean field": {"diagonal": True}, "some rows shifted": {"shift": 0.5 + 0.1 * seed, "share": 0.12 + 0.05 * seed},
            "some rows too narrow": {"scale": 0.6 - 0.05 * seed, "share": 0.12 + 0.05 * seed},
            "stale encoder": {"encoder": 0.85 - 0.05 * seed}}  # fmt: skip


def row_fits(seed):
    """Name, kind, what the exact posteriors are, and the guide."""
    rows = Rows(seed)
    for kind, steps in {"none": 2_000, "stopped early": 50}.items():
        vae = Trained(rows, steps)
        yield f"VAE {seed}, {steps} steps", kind, vae, vae.guide
    for kind, fault in ({"none": {}} | faulty(seed)).items():
        yield f"encoder {seed}", kind, rows, rows.guide(**fault)
    yield f"encoder {seed}", "none", rows, rows.guide(shift=0.03)


def truth_of_rows(rows, guide):
    """A fault where a tenth of the rows have one; right where all but one in fifty are."""
    idata = container(rows.model, guide, (rows.x,), DRAWS, seed=3, check=False)
    z = np.asarray(idata["groups"]["posterior"]["z"])[0]
    sd = np.sqrt(np.diag(rows.cov.numpy()))
    mean = np.abs((z.mean(0) - ((rows.x - rows.centre) @ rows.encoder.T).numpy()) / sd).max(-1)
    width = np.abs(np.log(z.std(0) / sd)).max(-1)
    centred = (z - z.mean(0)) / z.std(0)
    off = np.abs((centred[..., 0] * centred[..., 1]).mean(0) - float(rows.cov[0, 1]) / sd.prod())
    found = {"mean": mean, "sd": width, "dependence": off}
    wrong = np.any([v >= FAULT[k] for k, v in found.items()], 0).mean()
    right = np.all([v < RIGHT[k] for k, v in found.items()], 0).mean()
    sizes = {f"off_{k}": float(np.quantile(v, 0.9)) for k, v in found.items()} | {"off_tail": math.nan, "off_mass": 0.0}
    return sizes | {"truth": "fault" if wrong >= 0.1 else "right" if right >= 0.98 else "between"}
