"""What an amortised guide loses on series of which some times are missing, against the exact posterior.

x[t + 1] = rho x[t] + s e[t], from 0, of 60 times of which 30 to 100 % are seen, rho uniform and s log-normal. What is seen has the
density of the jumps between the times that are seen; the posterior is a sum over a grid of rho and log s. Rows (``--only``):
"masked" and "whole" learn ``--sizes`` simulations, with gaps or without, and are asked for data like these; "fresh" draws simulations
and gaps anew in each of 1,500 steps. Printed is E[log p(rho, s | y) - log q(rho, s | y)] over 200 series, and by the share seen.
"""

import math
import time
import warnings

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

TIMES, SERIES, STEPS = 60, 200, 1_500
EDGES = (0.0, 0.5, 0.75, 1.01)
RHO = torch.linspace(-0.995, 0.995, 200, dtype=torch.float64)
LOG_S = torch.linspace(-2.2, 2.2, 221, dtype=torch.float64)


def model(y=None):
    rho = pyro.sample("rho", dist.Uniform(-1.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    x, series = torch.zeros_like(rho), []
    for _ in range(TIMES):
        x = rho * x + s * torch.randn_like(rho)
        series.append(x)
    return pyro.sample("y", dist.Delta(torch.stack(series, -1), event_dim=1), obs=y)


def gaps(n, seed):
    generator = torch.Generator().manual_seed(seed)
    share = 0.3 + 0.7 * torch.rand(n, 1, generator=generator)
    present = torch.rand(n, TIMES, generator=generator) < share
    present[:, 0] = True
    return present


def log_joint(y, present, rho, log_s):
    """Log density of the seen times of one series, and of rho and log s."""
    total = dist.Normal(torch.zeros((), dtype=torch.float64), 0.5).log_prob(log_s) - math.log(2.0)
    last, gap = torch.zeros_like(rho), 0
    for t in range(TIMES):
        gap += 1
        if present[t]:
            sd = log_s.exp() * ((1.0 - rho ** (2 * gap)) / (1.0 - rho**2)).sqrt()
            total = total + dist.Normal(rho**gap * last, sd).log_prob(y[t])
            last, gap = y[t], 0
    return total


def exact(y, present, rho, s):
    """Log density of the truth in rho and s, mean and sd of rho."""
    grid = torch.meshgrid(RHO, LOG_S, indexing="ij")
    joint = log_joint(y, present, *grid)
    evidence = joint.logsumexp((0, 1)) + math.log((RHO[1] - RHO[0]) * (LOG_S[1] - LOG_S[0]))
    weights = (joint - joint.logsumexp((0, 1))).exp()
    mean = (weights * grid[0]).sum()
    sd = (weights * (grid[0] - mean).square()).sum().sqrt()
    return torch.stack([log_joint(y, present, rho, s.log()) - s.log() - evidence, mean, sd])


def trained(row, size, seed):
    torch.manual_seed(seed)
    guide = dgm.AmortizedGuide(model, ["y"], encoder="auto")
    if row == "fresh":
        inputs = lambda n: {"mask": {"y": gaps(n, int(torch.randint(2**31, ())))}}
        return guide, dgm.fit(dgm.ForwardKL(guide, inputs=inputs), max_steps=STEPS, progress=False, seed=seed)
    sims = dgm.simulate(model, size, observed=["y"], seed=seed, progress=False)
    if row == "masked":
        sims = dgm.Simulations(sims, ["y"], mask={"y": gaps(size, seed + 1)})
    return guide, dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=seed)


def main(arguments):
    warnings.simplefilter("ignore")
    test = dgm.simulate(model, SERIES, observed=["y"], seed=5, progress=False)
    rows = []
    for row in arguments.only or ("masked", "whole", "fresh"):
        present = gaps(SERIES, 6) if row != "whole" else torch.ones(SERIES, TIMES, dtype=torch.bool)
        each = zip(*(test[k].double() for k in ("y", "rho", "s")), present, strict=True)
        log_p, mean, sd = torch.stack([exact(y, there, rho, s) for y, rho, s, there in each]).T
        for size in arguments.sizes:
            for seed in arguments.seeds:
                began = time.process_time()
                guide, history = trained(row, size, seed)
                seconds = time.process_time() - began
                posterior = guide.condition(y=test["y"], mask={"y": present})
                with torch.no_grad():
                    lost = log_p - posterior.log_prob({k: test[k] for k in ("rho", "s")})
                draws = posterior.sample((2_000,))["rho"].double()
                rows.append({"row": row, "size": size, "seed": seed, "lost": float(lost.mean())})
                print(
                    f"{row}, {size} simulations, seed {seed}: {seconds:.0f} CPU s, best at {history.best_step} of {history.steps}; "
                    f"exact {-log_p.mean():.3f} nats, lost {lost.mean():.3f} +- {lost.std() / SERIES**0.5:.3f}",
                    flush=True,
                )
                share = present.double().mean(1)
                for low, high in zip(EDGES, EDGES[1:], strict=False):
                    here = (share >= low) & (share < high)
                    if here.any():
                        print(
                            f"  seen {low:.0%} to {high:.0%}: lost {lost[here].mean():.3f} +- "
                            f"{lost[here].std() / here.sum() ** 0.5:.3f}, sd of rho {draws.std(0)[here].mean():.3f} (exact "
                            f"{sd[here].mean():.3f}), mean off by {((draws.mean(0) - mean) / sd)[here].abs().mean():.2f} sd",
                            flush=True,
                        )
    return rows
