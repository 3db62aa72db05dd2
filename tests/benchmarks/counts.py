"""What an amortised guide loses on counts from 0 to millions, by the number of simulations, at the same number of steps.

Ten Poisson counts with rates exp(a + b t), a and b normal with sd 3. The exact posterior is a sum over a grid in the axes of its
curvature. ``--only 10000 100000`` are numbers of simulations; printed is E[log p(a, b | y) - log q(a, b | y)] over 2,000 fresh
data sets, and by their largest count.
"""

import math
import time
import warnings

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

STEPS = 1_800
EDGES = (0, 5, 20, 100, 1_000, math.inf)
DESIGN = torch.stack([torch.ones(10), torch.linspace(-1.0, 1.0, 10)], 1).double()
AXIS = torch.linspace(-10.0, 10.0, 101, dtype=torch.float64)
GRID = torch.cartesian_prod(AXIS, AXIS)


def model(y=None):
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    rates = (a.unsqueeze(-1) + b.unsqueeze(-1) * DESIGN[:, 1].float()).exp()
    return pyro.sample("y", dist.Poisson(rates).to_event(1), obs=y)


def log_joint(at, y):
    """Up to a constant of y; ``at`` of shape ``(..., 2)``."""
    eta = at @ DESIGN.mT
    return (y * eta - eta.exp()).sum(-1) - at.square().sum(-1) / 18.0


def mode(y):
    """The mode and the curvature there, by Newton's method with halved steps."""
    at = torch.linalg.lstsq(DESIGN, (y + 0.5).log()[:, None]).solution[:, 0]
    for _ in range(100):
        rates = (DESIGN @ at).exp()
        curvature = (DESIGN.mT * rates) @ DESIGN + torch.eye(2) / 9.0
        step = torch.linalg.solve(curvature, DESIGN.mT @ (y - rates) - at / 9.0)
        while log_joint(at + step, y) < log_joint(at, y) and step.abs().max() > 1e-10:
            step = 0.5 * step
        at = at + step
        if step.abs().max() < 1e-10:
            break
    return at, curvature


def exact(at, y):
    """log p(a, b | y)."""
    middle, curvature = mode(y)
    root = torch.linalg.cholesky(torch.linalg.inv(curvature))
    log_cell = 2.0 * (AXIS[1] - AXIS[0]).log() + root.diagonal().log().sum()
    return log_joint(at, y) - log_joint(middle + GRID @ root.mT, y).logsumexp(0) - log_cell


def trained(count, seed):
    sims = dgm.simulate(model, count, observed=["y"], seed=seed, progress=False)
    torch.manual_seed(seed)
    guide = dgm.AmortizedGuide(model, observed=["y"])
    history = dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=seed, max_steps=STEPS, batch_size=250)
    return guide, history


def main(arguments):
    warnings.simplefilter("ignore")
    test = dgm.simulate(model, 2_000, observed=["y"], seed=777, progress=False)
    at = torch.stack([test["a"], test["b"]], -1).double()
    log_p = torch.stack([exact(*pair) for pair in zip(at, test["y"].double(), strict=True)])
    largest = test["y"].amax(1)
    rows = []
    for count in map(int, arguments.only or ("10000", "100000")):
        for seed in arguments.seeds:
            began = time.process_time()
            guide, history = trained(count, seed)
            seconds = time.process_time() - began
            with torch.no_grad():
                lost = log_p - guide.condition(y=test["y"]).log_prob({k: test[k] for k in "ab"})
            parts = [
                float(lost[(largest >= low) & (largest < high)].mean())
                for low, high in zip(EDGES, EDGES[1:], strict=False)
            ]
            rows.append({"simulations": count, "seed": seed, "lost": float(lost.mean()), "parts": parts})
            print(
                f"{count} simulations, seed {seed}: {seconds:.0f} CPU s, best at {history.best_step} of {history.steps}; lost "
                f"{lost.mean():.3f} +- {lost.std() / len(lost) ** 0.5:.3f} nats; by largest count "
                + ", ".join(f"{p:.3f}" for p in parts),
                flush=True,
            )
    return rows
