"""Centred funnels: eight schools and Neal's funnel, each statement of the verdict held to the truth.

Neal's funnel of D latents, v ~ N(0, s) and D - 1 of x ~ N(0, exp(v / 2)), is known exactly; eight schools, fully centred, by a grid over
tau, given which all else is normal. ``--only schools 30:1.5 100:3`` takes some (D:s). 4,000 draws a verdict, 40,000 held to the truth.
Columns: verdict, k-hat, gap; largest error, over latents, of a mean (in sds), a log sd, a quantile from 5 to 95 % (in sds) and of the
shares beyond the 1 and 99 % quantiles (as sds of a normal law); of the log evidence and of the ELBO (nats); CPU seconds; and where the verdict takes means, sds, quantiles and tails from: (d)raws, (w)eights, (n)owhere. Draws are clamped to the
truth's range from .1 to 99.9 %, since the sd of a funnel's mouth is made by few draws.
"""

import math
import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import logsumexp

import pyro_dgm as dgm
from tests.benchmarks._verdict_truth import Reference, container, flat, sizes

CASES = ("schools", "30:1.5", "100:1.5", "30:3", "100:3")
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
DRAWS = 40_000  # that are held to the truth


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, tau)), sigma), obs=y)


def exact_schools(count=400_000):
    """Exact draws, and the log evidence: tau on a fine grid of log tau, mu and theta given it normal."""
    y, s2 = Y.double().numpy(), SIGMA.double().numpy() ** 2
    log_tau = np.linspace(-12.0, 8.0, 40_001)
    tau = np.exp(log_tau)
    v = s2 + tau[:, None] ** 2
    precision = 1.0 / 25.0 + (1.0 / v).sum(1)
    centre = (y / v).sum(1) / precision
    log_y = (
        (-0.5 * (np.log(2 * np.pi * v) + y**2 / v)).sum(1)
        - 0.5 * np.log(25.0 * precision)
        + 0.5 * centre**2 * precision
    )
    log_p = log_y + np.log(2.0 / (np.pi * 5.0)) - np.log1p((tau / 5.0) ** 2) + log_tau
    evidence = float(logsumexp(log_p) + math.log(log_tau[1] - log_tau[0]))
    rng = np.random.default_rng(0)
    i = rng.choice(len(tau), count, p=np.exp(log_p - logsumexp(log_p)))
    mu = centre[i] + rng.normal(size=count) / np.sqrt(precision[i])
    t2 = tau[i, None] ** 2
    theta = (mu[:, None] * s2 + y * t2) / (s2 + t2) + rng.normal(size=(count, 8)) * np.sqrt(t2 * s2 / (s2 + t2))
    return {"mu": mu, "tau": tau[i], "theta": theta}, evidence


def neal(d, spread):
    def model():
        v = pyro.sample("v", dist.Normal(0.0, spread))
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()[..., None].expand(*v.shape, d - 1)).to_event(1))

    return model


def exact_neal(d, spread, count=100_000):
    rng = np.random.default_rng(0)
    v = spread * rng.normal(size=count)
    return {"v": v, "x": np.exp(v / 2)[:, None] * rng.normal(size=(count, d - 1))}, 0.0


def known(name):
    """Model, arguments, exact draws of each latent (of one x for all), log evidence."""
    if name == "schools":
        return schools, (SIGMA, Y), *exact_schools()
    d, spread = name.split(":")
    return neal(int(d), float(spread)), (), *exact_neal(int(d), float(spread))


def row(name, seed):
    model, args, exact, evidence = known(name)
    pyro.clear_param_store()
    began = time.process_time()
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), args, progress=False, seed=seed)
    seconds = time.process_time() - began
    v = dgm.khat(container(model, guide, args, 4_000, seed))
    draws = container(model, guide, args, DRAWS, seed + 1, check=False)["groups"]["posterior"]
    off = sizes(flat({k: draws[k][0] for k in exact}), Reference(flat(exact), "exact"))
    return {"name": name, "seed": seed, "status": v.status, "k": v.k, "gap": v.gap, **off,
            "evidence": v.log_evidence - evidence, "elbo": v.elbo - evidence, "seconds": seconds,
            "from": [v.statements[k][:2] for k in ("means", "sds", "quantiles", "tails")], "says": str(v)}  # fmt: skip


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'funnel':>8s}{'seed':>5s}{'verdict':>8s}{'k':>7s}{'gap':>7s}{'mean':>7s}{'log sd':>7s}{'5-95':>7s}{'1, 99':>7s}{'evid.':>8s}{'ELBO':>8s}{'CPU s':>7s}"
    )
    for name in arguments.only or CASES:
        for seed in arguments.seeds:
            rows.append(r := row(name, seed))
            print(f"{name:>8s}{seed:5d}{r['status']:>8s}{r['k']:7.2f}{r['gap']:7.3f}{r['mean']:7.3f}{r['sd']:7.3f}{r['central']:7.3f}"
                  f"{r['tail']:7.3f}{r['evidence']:8.3f}{r['elbo']:8.3f}{r['seconds']:7.1f}  {' '.join(r['from'])}", flush=True)  # fmt: skip
    return rows
