"""Means, sds and log evidence of a posterior without reference draws, from its density alone: no guide is asked.

Few latents: weighted draws of a multivariate t that four rounds fit to the weighted draws before, from the normal law at the best
mode. Many: 128 Hamiltonian chains from draws of the prior that climbed, and the evidence by a bridge between a half of their draws
and the normal law of the other half. Each says its Monte-Carlo error, and is refused where it is too large.
"""

import math
from dataclasses import dataclass

import arviz as az
import numpy as np
import pyro
import torch
from scipy.optimize import minimize
from torch.distributions import Chi2, MultivariateNormal

import pyro_dgm as dgm
from pyro_dgm.model.hmc import trajectories
from pyro_dgm.model.log_joint import LogJoint, value_and_grad

FEW = 30  # latents
DEGREES, ROUNDS, DRAWS, LAST, AT_ONCE = 5.0, 5, 20_000, 100_000, 500
STARTS = 8
LARGEST_ERROR = 0.03  # sd, of a mean; nats, of the log evidence


@dataclass
class Truth:
    """By element of all sites in the order of the model; ``error`` is that of the means, in sds."""

    mean: np.ndarray
    sd: np.ndarray
    error: float
    log_evidence: float
    evidence_error: float
    source: str


def truth_of(model, data, unit=lambda x: x):
    """``unit`` makes of all elements ``(n, F)`` what is judged."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = dgm.AutoFlow(model, structure="joint").setup(data)
    log_joint = LogJoint(guide, model, (data,), {})
    with torch.no_grad():
        values = lambda u: unit(flat(log_joint.constrain(u)[0]))
        found = (by_weights if log_joint.dim <= FEW else by_chains)(log_joint, values)
    if not max(found.error, found.evidence_error) < LARGEST_ERROR:
        raise RuntimeError(f"the reference of {model.__name__} is too rough: {found}")
    return found


def flat(values):
    return np.concatenate([v.reshape(len(v), -1).numpy() for v in values.values()], -1)


def in_parts(function, u):
    return torch.cat([function(some) for some in u.split(AT_ONCE)])


# --- Weighted draws ---


def best_mode(log_joint):
    """Of L-BFGS paths from zero and from standard normal draws."""

    def loss(u):
        value, grad = value_and_grad(log_joint, torch.as_tensor(u)[None])
        return (-float(value), -grad[0].numpy()) if value.isfinite() else (1e10, 0.0 * u)

    starts = [np.zeros(log_joint.dim), *torch.randn(STARTS, log_joint.dim).numpy()]
    ends = [minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000}) for start in starts]
    return torch.as_tensor(min(ends, key=lambda end: end.fun).x)


def curvature(log_joint, u, step=1e-4):
    """The covariance of the normal law at a mode, by differences of gradients."""
    offsets = step * torch.eye(len(u))
    grad = value_and_grad(log_joint, torch.cat([u + offsets, u - offsets]))[1]
    precision = -(grad[: len(u)] - grad[len(u) :]) / (2.0 * step)
    return torch.linalg.inv(0.5 * (precision + precision.T))


def wide_draws(mean, cov, count):
    """Of a multivariate t, and their log densities."""
    d, root = len(mean), torch.linalg.cholesky(cov)
    z = torch.randn(count, d) * (DEGREES / Chi2(DEGREES).sample((count, 1))).sqrt()
    const = math.lgamma((DEGREES + d) / 2) - math.lgamma(DEGREES / 2) - 0.5 * d * math.log(DEGREES * math.pi)
    log_q = const - root.diagonal().log().sum() - 0.5 * (DEGREES + d) * (z.square().sum(-1) / DEGREES).log1p()
    return mean + z @ root.T, log_q


def by_weights(log_joint, values):
    mean = best_mode(log_joint)
    cov = curvature(log_joint, mean)
    for i in range(ROUNDS):
        u, log_q = wide_draws(mean, cov, LAST if i == ROUNDS - 1 else DRAWS)
        log_w = in_parts(log_joint, u) - log_q
        w = log_w.softmax(0)
        mean, cov = w @ u, torch.cov(u.T, aweights=w)
    draws, w, rough = values(u), w.numpy(), float(w.square().sum().sqrt())
    mean = w @ draws
    evidence = float(log_w.logsumexp(0)) - math.log(len(w))
    return Truth(mean, np.sqrt(w @ (draws - mean) ** 2), rough, evidence, rough, "weights")


# --- Chains ---

CHAINS, WARM, KEPT, THINNED = 128, (300, 300, 400, 500), 3_000, 5


def by_chains(log_joint, values):
    """Coordinates are made white by the draws of all chains, after each round of a warm-up."""
    u = climbed_a_little(log_joint, torch.randn(CHAINS, log_joint.dim))
    white = whitening(u, shrunk=True)
    for count in WARM:
        u = torch.stack(moved(log_joint, white, u, count)[count // 2 :])
        white, u = whitening(u.flatten(0, 1)), u[-1]
    z = torch.stack(moved(log_joint, white, u, KEPT)[::THINNED], 1)
    draws = values(z.flatten(0, 1))
    ess = np.min([float(az.ess(x)) for x in draws.reshape(*z.shape[:2], -1).transpose(2, 0, 1)])
    evidence, error = bridged(log_joint, z.flatten(0, 1))
    return Truth(draws.mean(0), draws.std(0), ess**-0.5, evidence, error, f"chains, ESS {ess:.0f}")


def climbed_a_little(log_joint, u, steps=300):
    """Adam steps: the chains begin where the density is not wild."""
    u = u.clone().requires_grad_()
    optimizer = torch.optim.Adam([u], lr=0.02)
    for _ in range(steps):
        u.grad = -value_and_grad(log_joint, u)[1]
        optimizer.step()
    return u.detach()


def whitening(u, shrunk=False):
    cov = torch.cov(u.T) if not shrunk else 0.01 * torch.eye(u.shape[-1])
    return u.mean(0), torch.linalg.cholesky(cov)


def moved(log_joint, white, u, count):
    """The places after each of so many trajectories."""
    mean, root = white
    density = lambda z: log_joint(mean + z @ root.T)
    z = torch.linalg.solve_triangular(root, (u - mean).T, upper=False).T
    moves = zip(range(count), trajectories(density, z), strict=False)
    return [mean + each.z @ root.T for _, each in moves]


def bridged(log_joint, u):
    """Log evidence by the optimal bridge (Meng & Wong 1996), and its error over eight parts of the draws."""
    parts = [bridge(log_joint, part) for part in u[torch.randperm(len(u))].chunk(8)]
    return float(np.mean(parts)), float(np.std(parts) / len(parts) ** 0.5)


def bridge(log_joint, u):
    fit, held = u.chunk(2)
    q = MultivariateNormal(fit.mean(0), torch.cov(fit.T))
    own = q.sample((len(held),))
    at_p, at_q = (in_parts(log_joint, x) - q.log_prob(x) for x in (held, own))
    r = torch.tensor(float(at_p.median()))
    for _ in range(1_000):
        top = (at_q - torch.logaddexp(at_q, r)).logsumexp(0)
        r = top - (-torch.logaddexp(at_p, r)).logsumexp(0)
    return float(r)
