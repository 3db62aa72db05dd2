"""Error and time over the dimension: a Gaussian of condition number 1e4, a funnel, and regressions, logistic and with a horseshoe.

The Gaussian and the funnel are known exactly; the logistic regression is compared with long Hamiltonian chains that start at the
guide's draws and move in its coordinates. ``--only logistic:300 gaussian:1000`` takes some rows.
Columns: largest |mean - exact| / sd; largest |log(sd / exact)|; evidence - ELBO (exact or the importance-weighted gap, nats);
k-hat; steps; CPU seconds to the end of the start, of the fit and of the verdict on 4,000 draws.
"""

import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from pyro_dgm.model.hmc import trajectories
from pyro_dgm.model.log_joint import LogJoint, PulledBack

SIZES = (10, 30, 100, 300)
LARGEST = 1000  # of the Gaussian
CHAINS, ITERATIONS, FORGOTTEN = 256, 300, 100  # of long chains


def gaussian(d):
    rotation = torch.linalg.qr(torch.randn(d, d)).Q
    scale_tril = torch.linalg.cholesky(rotation * torch.logspace(-2, 2, d) @ rotation.T)

    def model(scale_tril):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(d), scale_tril=scale_tril))

    return model, (scale_tril,), torch.zeros(d), scale_tril.square().sum(-1).sqrt(), 0.0


def funnel(d):
    """Neal's funnel with v ~ N(0, 1.5), which one affine coupling follows; sd of x is E[exp v]^(1/2)."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 1.5))
        pyro.sample("x", dist.Normal(torch.zeros(d - 1), (0.5 * v[..., None]).exp()).to_event(1))

    sd = torch.cat([torch.tensor([1.5]), torch.full((d - 1,), np.exp(1.5**2 / 4.0).item())])
    return model, (), torch.zeros(d), sd, 0.0


def logistic(d):
    x = torch.randn(500, d) / d**0.5
    y = torch.bernoulli(torch.sigmoid(x @ torch.randn(d) * 2.0))

    def model(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(d), 2.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=b @ x.T if b.dim() == 1 else (b @ x.T).squeeze(-2)), obs=y)

    return model, (x, y), None, None, None


def horseshoe(d):
    """As many columns as half of the latents, five of which matter, and 200 rows."""
    columns = d // 2 - 1
    x, b = torch.randn(200, columns), torch.zeros(columns)
    b[:5] = torch.tensor([3.0, -2.0, 1.5, 1.0, -1.0])
    y = x @ b + torch.randn(200)

    def model(x, y):
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("column", columns):
            width = pyro.sample("width", dist.HalfCauchy(1.0))
            slope = pyro.sample("z", dist.Normal(0.0, 1.0)) * width * tau
        with pyro.plate("row", 200):
            pyro.sample("y", dist.Normal(slope @ x.T, sigma), obs=y)

    return model, (x, y), None, None, None


def by_chains(guide, model, args):
    """Mean and sd of each latent, by long chains."""
    with torch.no_grad():
        density = PulledBack(LogJoint(guide, model, args, {}), guide.get_transform(*args))
        start = density.transform.inv(guide.get_posterior(*args).sample((CHAINS,)))
        moves = zip(range(ITERATIONS), trajectories(density, start), strict=False)
        places = torch.cat([density.transform(moved.z) for i, moved in moves if i >= FORGOTTEN])
    return places.mean(0), places.std(0)


def row(make, d):
    pyro.set_rng_seed(7)
    pyro.clear_param_store()
    model, args, mean, sd, evidence = make(d)
    guide, began = dgm.AutoFlow(model), time.process_time()
    guide.warm_start(*args)
    start = time.process_time() - began
    history = dgm.fit(dgm.STL_ELBO()(model, guide), args, progress=False, seed=0)
    trained = time.process_time() - began
    idata = dgm.from_svi(model, guide, *args, num_samples=4000, prior=0, posterior_predictive=False, log_likelihood=False,
                         seed=0, container="dict")  # fmt: skip
    verdict, seconds = dgm.khat(idata), time.process_time() - began
    draws = torch.cat([torch.as_tensor(v[0]).reshape(4000, -1) for v in idata["groups"]["posterior"].values()], -1)
    if make is logistic:
        mean, sd = by_chains(guide, model, args)
    result = {"target": make.__name__, "D": d, "khat": verdict.k, "kl": verdict.gap if evidence is None else evidence - verdict.elbo,
              "steps": history.steps, "start": start, "trained": trained, "seconds": seconds, "verdict": verdict.status}  # fmt: skip
    if mean is not None:
        result["mean"] = float(((draws.mean(0) - mean) / sd).abs().max())
        result["sd"] = float((draws.std(0) / sd).log().abs().max())
    return result


TARGETS = {each.__name__: each for each in (gaussian, funnel, logistic, horseshoe)}


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = []
    print(
        f"{'target':12s}{'D':>5s}{'mean':>8s}{'sd':>8s}{'KL':>9s}{'k-hat':>7s}{'steps':>7s}{'start s':>9s}{'fit s':>8s}{'CPU s':>8s}  verdict"
    )
    names = arguments.only or [f"{name}:{d}" for name in TARGETS for d in SIZES] + [f"gaussian:{LARGEST}"]
    for name, _, d in (each.partition(":") for each in names):
        rows.append(r := row(TARGETS[name], int(d)))
        errors = "".join(f"{r[k]:8.3f}" if k in r else "       -" for k in ("mean", "sd"))
        print(f"{r['target']:12s}{r['D']:5d}{errors}{r['kl']:9.4f}{r['khat']:7.2f}{r['steps']:7d}{r['start']:9.1f}{r['trained']:8.1f}"
              f"{r['seconds']:8.1f}  {r['verdict']}", flush=True)  # fmt: skip
    return rows
