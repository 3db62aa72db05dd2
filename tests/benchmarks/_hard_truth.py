"""Means, sds and log evidence of a posterior without reference draws, from its density: no trained guide is asked.

Few latents: weighted draws of multivariate t, fit in rounds to the weighted draws before, from the normal law at the best mode on.
Many: 128 Hamiltonian chains, and the evidence by a bridge between a half of their draws and the normal law of the other half. Each
says its Monte-Carlo error, and is refused where it is too large; an evidence that is too rough is left out, and not judged.
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
from pyro_dgm.guides.start import find_start
from pyro_dgm.model.hmc import trajectories
from pyro_dgm.model.log_joint import LogJoint, value_and_grad
from tests.benchmarks._hard_models import IN_LOGS

FEW = 30  # latents
DEGREES, ROUNDS, DRAWS, LAST, AT_ONCE = 5.0, 6, 20_000, 100_000, 500
CENTRES, NARROW = 200, 0.5
STARTS = 8
LARGEST_ERROR = 0.03  # sd, of a mean; of a log sd; nats, of the log evidence


@dataclass
class Truth:
    """By element of all sites in the order of the model; ``error`` is the larger of a mean's, in sds, and of a log sd's."""

    mean: np.ndarray
    sd: np.ndarray
    error: float
    log_evidence: float | None
    evidence_error: float
    source: str


def truth_of(model, data):
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = dgm.AutoFlow(model, structure="joint").setup(data)
    log_joint = LogJoint(guide, model, (data,), {})
    with torch.no_grad():
        values = lambda u: judged(log_joint.constrain(u)[0])
        found = (by_weights if log_joint.dim <= FEW else by_chains)(log_joint, values)
    if not found.evidence_error < LARGEST_ERROR:
        found.log_evidence = None
    if not found.error < LARGEST_ERROR:
        raise RuntimeError(f"the reference of {model.__name__} is too rough: {found}")
    return found


def judged(values):
    """Of draws by site ``(n, *site)`` what means and sds are held to, ``(n, F)``: the latents, or their logarithms."""
    units = {k: v.log() if k in IN_LOGS else v for k, v in values.items()}
    return np.concatenate([v.reshape(len(v), -1).numpy() for v in units.values()], -1)


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


class Wide:
    """Half a multivariate t, half one of smaller ones around centres, so that a tail that is bent is proposed, too."""

    def __init__(self, mean, cov, centres):
        self.mean, self.centres, self.root = mean, centres, torch.linalg.cholesky(cov)

    def draws(self, count):
        d = len(self.mean)
        z = torch.randn(count, d) * (DEGREES / Chi2(DEGREES).sample((count, 1))).sqrt() @ self.root.T
        around = self.centres[torch.randint(len(self.centres), (count // 2,))] + NARROW * z[: count // 2]
        return torch.cat([around, self.mean + z[count // 2 :]])

    def log_prob(self, u):
        narrow = self.log_t((u[:, None] - self.centres) / NARROW) - len(self.mean) * math.log(NARROW)
        mixed = narrow.logsumexp(1) - math.log(len(self.centres))
        return torch.logaddexp(mixed, self.log_t(u - self.mean)) - math.log(2.0)

    def log_t(self, offset):
        d, z = len(self.mean), offset @ torch.linalg.inv(self.root).T
        const = math.lgamma((DEGREES + d) / 2) - math.lgamma(DEGREES / 2) - 0.5 * d * math.log(DEGREES * math.pi)
        return const - self.root.diagonal().log().sum() - 0.5 * (DEGREES + d) * (z.square().sum(-1) / DEGREES).log1p()


def by_weights(log_joint, values):
    mean = best_mode(log_joint)
    q = Wide(mean, curvature(log_joint, mean), mean[None])
    for i in range(ROUNDS):
        u = q.draws(LAST if i == ROUNDS - 1 else DRAWS)
        log_w = in_parts(lambda some: log_joint(some) - q.log_prob(some), u)
        w = log_w.softmax(0)
        q = Wide(w @ u, torch.cov(u.T, aweights=w), u[torch.multinomial(w, CENTRES)])
    rough = float(w.square().sum().sqrt())
    evidence = float(log_w.logsumexp(0)) - math.log(len(w))
    mean, sd, error = moments(values(u), w.numpy(), np.random.default_rng(0).permutation(len(w)))
    return Truth(mean, sd, max(rough, error), evidence, rough, "weights")


def moments(draws, w, order):
    """Means and sds of weighted draws, and the largest error of a log sd, by ten parts of the draws."""
    parts = [sd_of(draws[part], w[part]) for part in np.array_split(order, 10)]
    return w @ draws, sd_of(draws, w), float(np.log(parts).std(0).max() / 10**0.5)


def sd_of(draws, w):
    w = w / w.sum()
    return np.sqrt(w @ (draws - w @ draws) ** 2)


# --- Chains ---

CHAINS, WARM, KEPT, THINNED = 128, (300, 300, 400, 500), 12_000, 20


def by_chains(log_joint, values):
    """From draws of the best normal law; coordinates are made white by the draws of all chains, after each round of a warm-up."""
    start = find_start(log_joint)
    white = start.loc[0], start.scale_tril[0]
    u = white[0] + torch.randn(CHAINS, log_joint.dim) @ white[1].T
    for count in WARM:
        u = torch.stack(moved(log_joint, white, u, count)[count // 2 :])
        white, u = whitening(u.flatten(0, 1)), u[-1]
    u = torch.stack(moved(log_joint, white, u, KEPT, THINNED), 1)
    draws = values(u.flatten(0, 1))
    ess = np.min([float(az.ess(x)) for x in draws.reshape(*u.shape[:2], -1).transpose(2, 0, 1)])
    evidence, error = bridged(log_joint, u.flatten(0, 1))
    mean, sd, rough = moments(draws, np.full(len(draws), 1.0 / len(draws)), np.arange(len(draws)))
    return Truth(mean, sd, max(rough, ess**-0.5), evidence, error, f"chains, ESS {ess:.0f}")


def whitening(u):
    return u.mean(0), torch.linalg.cholesky(torch.cov(u.T))


def moved(log_joint, white, u, count, every=1):
    """The places after so many trajectories, of each or of some."""
    mean, root = white
    density = lambda z: log_joint(mean + z @ root.T)
    z = torch.linalg.solve_triangular(root, (u - mean).T, upper=False).T
    moves = zip(range(count), trajectories(density, z), strict=False)
    return [mean + each.z @ root.T for i, each in moves if i % every == 0]


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
