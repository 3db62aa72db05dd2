"""A default AutoFlow to its verdict against its peers, on the reference posteriors, in one process and one thread.

``--only units``: CPU seconds of ``fit``, ``from_svi`` and ``khat`` with their defaults over those of 300 steps of stock SVI with
``AutoNormal`` and 16 vectorised particles, on the same model in the same run. Other words of ``--only`` are parts of names.
A first fit and first steps of a small model come before, so that what a process does once is in neither.

Needs the folder ``../shared/posteriordb`` beside the checkout, as ``posteriordb`` does. float64.
"""

import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_dgm as dgm
from tests.benchmarks.posteriordb import references

PARTS = ("units",)
MOST_DIM = 30  # the bar on the worst ratio is for posteriors of at most so many dimensions


def stock_steps(model, args, seed=0, steps=300):
    """CPU seconds of so many steps of stock SVI, the first with its set-up."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(16, vectorize_particles=True))
    for _ in range(steps):
        svi.step(*args)
    return time.process_time() - began


def default_fit(model, args, seed=0):
    """CPU seconds to the end of the fit, and to the verdict; the history and the verdict."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    guide = dgm.AutoFlow(model)
    history = dgm.fit(dgm.STL_ELBO()(model, guide), args, progress=False, seed=seed)
    fitted = time.process_time()
    verdict = dgm.khat(dgm.from_svi(model, guide, *args, seed=seed, container="dict"))
    return fitted - began, time.process_time() - fitted, history, verdict


def warmed_up(x):
    """A model of one latent."""
    pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)


def unit_row(p, name, seed):
    before = stock_steps(p.model, (p.data,), seed)
    fit, verdict, history, found = default_fit(p.model, (p.data,), seed)
    unit = 0.5 * (before + stock_steps(p.model, (p.data,), seed))
    return {"posterior": name, "seed": seed, "dim": p.dim, "unit": unit, "fit": fit, "verdict": verdict, "steps": history.steps,
            "ratio": (fit + verdict) / unit, "khat": found.k, "gap": found.gap, "status": found.status}  # fmt: skip


def units(posteriors, seeds):
    """The table of ratios, with their median and the worst."""
    stock_steps(warmed_up, (torch.tensor(0.5),), steps=5)
    default_fit(warmed_up, (torch.tensor(0.5),))
    print(
        f"{'posterior':42s}{'D':>4s}{'stock s':>9s}{'fit s':>8s}{'verdict s':>11s}{'steps':>7s}{'ratio':>7s}  verdict"
    )
    rows = []
    for name, p in posteriors:
        for seed in seeds:
            rows.append(r := unit_row(p, name, seed))
            print(f"{r['posterior']:42s}{r['dim']:4d}{r['unit']:9.2f}{r['fit']:8.2f}{r['verdict']:11.2f}{r['steps']:7d}"
                  f"{r['ratio']:7.2f}  {r['status']} (k-hat {r['khat']:.2f}, gap {r['gap']:.3f})", flush=True)  # fmt: skip
    ratios = [r["ratio"] for r in rows if r["dim"] <= MOST_DIM]
    if ratios:
        print(f"units: median {np.median(ratios):.2f}, worst {max(ratios):.2f} of {len(ratios)} rows (D <= {MOST_DIM})")
    return rows


def main(arguments):
    return units(references([w for w in arguments.only or [] if w not in PARTS]), arguments.seeds)
