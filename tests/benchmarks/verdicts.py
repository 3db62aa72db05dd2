"""Does the verdict catch bad fits? Eight faults planted in the trained flow of six posteriors, and the flows as they are.

A fault counts as caught where the verdict is "usable" or "bad"; a trained flow that is called either is a false alarm.
"""

import warnings

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from tests.benchmarks import supports

FAULTS = {"shifted by half a sd": (0.5, 0.0), "shifted by a sd": (1.0, 0.0), "too narrow (0.7)": (0.0, -0.357),
          "too wide (1.5)": (0.0, 0.405), "shifted and narrow": (0.4, -0.3)}  # fmt: skip


def schools():
    """The centred eight schools: a funnel."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y, sigma):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model, (y, sigma), None


def correlated():
    """A plane regression with two covariates that nearly agree: posterior correlation -0.98."""
    x = torch.randn(50)
    z = x + 0.15 * torch.randn(50)
    y = x + z + torch.randn(50)

    def model(x, z, y):
        a, b = pyro.sample("a", dist.Normal(0.0, 5.0)), pyro.sample("b", dist.Normal(0.0, 5.0))
        with pyro.plate("row", 50):
            pyro.sample("y", dist.Normal(a * x + b * z, 1.0), obs=y)

    return model, (x, z, y), None


def bimodal():
    """A sign that the data leave open."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(a.square(), scale), obs=y)

    return model, (4.0 + 0.5 * torch.randn(10),), None


POSTERIORS = [schools, correlated, bimodal, supports.hierarchy, supports.ordered, supports.enumerated_mixture]


def fitted(model, args, **limits):
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), args, progress=False, seed=0, **limits)
    return guide


def faults(model, args, guide):
    """Name and guide of every fault; the trained guide is put back afterwards."""
    good = [c.affine.detach().clone() for c in guide._posterior.components]
    for name, (shift, log_scale) in FAULTS.items():
        with torch.no_grad():
            for component, affine in zip(guide._posterior.components, good, strict=True):
                component.affine.copy_(affine + affine.new_tensor([[shift], [log_scale]]))
        yield name, guide
    with torch.no_grad():
        for component, affine in zip(guide._posterior.components, good, strict=True):
            component.affine.copy_(affine)
    yield "mean field", by_stock(model, args)
    pyro.clear_param_store()  # a new guide would take the trained one's values from it
    early = dgm.AutoFlow(model).setup(*args)
    pyro.infer.SVI(model, early, pyro.optim.Adam({"lr": 5e-3}), dgm.STL_ELBO()).step(*args)
    yield "stopped at once, no warm start", early
    if guide.modes > 1:
        guide._posterior.keep([0])
        yield "a mode left out", guide


def by_stock(model, args):
    """A trained diagonal Gaussian."""
    guide = pyro.infer.autoguide.AutoDiagonalNormal(model)
    svi = pyro.infer.SVI(
        model,
        guide,
        pyro.optim.ClippedAdam({"lr": 2e-2, "lrd": 0.999}),
        pyro.infer.Trace_ELBO(16, vectorize_particles=True),
    )
    for _ in range(1_500):
        svi.step(*args)
    return guide


def verdict(model, args, guide, draws=4000):
    return dgm.khat(dgm.from_svi(model, guide, *args, num_samples=draws, prior=0, posterior_predictive=False,
                                 log_likelihood=False, seed=1, container="dict"))  # fmt: skip


def judged(name, model, args, guide):
    v = verdict(model, args, guide)
    return {"fault": name, "status": v.status, "khat": v.k, "gap": v.gap, "ess": v.ess, "drift": v.drift, "drift_sd": v.drift_sd,
            "other_modes": v.other_modes}  # fmt: skip


def rows_of(make):
    pyro.set_rng_seed(20)
    model, args, _ = make()
    guide = fitted(model, args)
    yield {"posterior": make.__name__, **judged("none", model, args, guide)}
    skip_stock = make is supports.enumerated_mixture  # stock guides do not leave enumerated sites out
    for name, bad in faults(model, args, guide) if not skip_stock else ():
        yield {"posterior": make.__name__, **judged(name, model, args, bad)}


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = []
    print(f"{'posterior':22s}{'fault':32s}{'k-hat':>7s}{'gap':>9s}{'drift':>7s}{'sd':>6s}{'modes':>6s}  verdict")
    for make in POSTERIORS:
        for r in rows_of(make):
            rows.append(r)
            print(f"{r['posterior']:22s}{r['fault']:32s}{r['khat']:7.2f}{r['gap']:9.3f}{r['drift']:7.2f}{r['drift_sd']:6.2f}"
                  f"{r['other_modes']:6d}  {r['status']}", flush=True)  # fmt: skip
    bad = [r for r in rows if r["fault"] != "none"]
    caught = sum(r["status"] in ("usable", "bad") for r in bad)
    by_k = sum(r["khat"] >= 0.7 for r in bad)
    alarms = sum(r["status"] in ("usable", "bad") for r in rows if r["fault"] == "none")
    print(
        f"caught {caught} of {len(bad)} faults (k-hat >= 0.7 alone: {by_k}); false alarms: {alarms} of {len(rows) - len(bad)}"
    )
    return rows
