"""Amortised posteriors of a hierarchy of 2 to 16 groups against the exact posterior on a grid.

The simulators of the SBI benchmark, beside the sbi package, are in ``python -m tests.benchmarks sbi``.
"""

import math
import time
import warnings

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

SIZE = 16  # groups at most


def hierarchy(sigma, y=None):
    """Group effects around a mean, seen with known errors: the eight schools with any number of schools."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("group", sigma.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def inputs(n):
    """Errors between 1 and 10, of 2 to 16 groups."""
    present = torch.arange(SIZE) < torch.randint(2, SIZE + 1, (n, 1))
    return {"sigma": torch.exp(math.log(10.0) * torch.rand(n, SIZE)), "mask": {"y": present, "theta": present}}


def grid_posterior(y, sigma, points=4000):
    """Mean and sd of mu and tau: mu is Gaussian given tau, and tau stands on a grid."""
    tau = (torch.arange(points, dtype=torch.float64) + 0.5) * (40.0 / points)
    variance = tau[:, None] ** 2 + sigma.double() ** 2
    precision = 1.0 / 25.0 + (1.0 / variance).sum(-1)
    mean = (y.double() / variance).sum(-1) / precision
    log_p = -0.5 * (tau / 5.0) ** 2 - 0.5 * variance.log().sum(-1) - 0.5 * (y.double() ** 2 / variance).sum(-1)
    w = torch.softmax(log_p + 0.5 * precision * mean**2 - 0.5 * precision.log(), 0)
    mu = (w * mean).sum()
    mu_sd = ((w * (1.0 / precision + mean**2)).sum() - mu**2).sqrt()
    at = (w * tau).sum()
    return {"mu": (mu, mu_sd), "tau": (at, ((w * tau**2).sum() - at**2).sqrt())}


def trained_hierarchy(steps, seed):
    guide = dgm.AmortizedGuide(hierarchy, ["y"], args=(torch.ones(SIZE),), covariates=["sigma"])
    began = time.process_time()
    dgm.fit(dgm.ForwardKL(guide, inputs=inputs), max_steps=steps, progress=False, seed=seed)
    return guide, time.process_time() - began


def compared(guide, size, sets=6, draws=3000, seed=0):
    """Errors of the means in sd, sd ratios, before and after refinement, and effective draws; averages over data sets."""
    torch.manual_seed(seed + 1000 * size)
    rows, errors = [], {"raw": [], "refined": []}
    for _ in range(sets):
        sigma = torch.exp(math.log(10.0) * torch.rand(size))
        with torch.no_grad():
            y = pyro.poutine.trace(hierarchy).get_trace(sigma).nodes["y"]["value"]
        posterior, exact = guide.condition(y=y, sigma=sigma), grid_posterior(y, sigma)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refined = posterior.refine(draws, proposals=draws)
        rows.append((refined.ess / refined.proposed, refined.khat))
        for kind, drawn in (("raw", posterior.sample((draws,))), ("refined", refined.draws)):
            errors[kind].append([
                [float((drawn[k].double().mean() - m) / s), float(drawn[k].double().std() / s)] for k, (m, s) in exact.items()
            ])  # fmt: skip
    out = {
        "groups": size,
        "ess": sum(r[0] for r in rows) / sets,
        "worst ess": min(r[0] for r in rows),
        "worst khat": max(r[1] for r in rows),
    }
    for kind, found in errors.items():
        t = torch.tensor(found)
        out |= {f"{kind} |mean error| / sd": [round(v, 3) for v in t[..., 0].abs().mean(0).tolist()]}
        out |= {f"{kind} sd ratio": [round(v, 3) for v in t[..., 1].mean(0).tolist()]}
    return out


def main(arguments):
    rows = []
    for seed in arguments.seeds:
        guide, seconds = trained_hierarchy(1500, seed)
        print(f"hierarchy, seed {seed}: {seconds:.0f} CPU s of training")
        for size in (4, 8, 16):
            rows.append({"seed": seed, **compared(guide, size)})
            print(rows[-1])
    return rows
