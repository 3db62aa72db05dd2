"""What a guide's draws are held to: a reference of each posterior, and how far draws are from it.

References are exact draws where the posterior is known; else draws of a mixture of the fitted guide and one twice as wide, weighted
by the model's density; else long Hamiltonian chains. They are asked of the first fit, so that a mode that it misses is missing
from the second and third kind: posteriors with several modes bring exact draws.
"""

import math
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import numpy as np
import pyro
import torch
from scipy.stats import norm
from torch import nn
from torch.distributions import Transform, constraints

import pyro_dgm as dgm
from pyro_dgm.core.module import composed
from pyro_dgm.core.weights import stratified
from pyro_dgm.guides.modes import WhitenedPosterior
from pyro_dgm.model.hmc import trajectories
from pyro_dgm.model.log_joint import LogJoint, PulledBack

WEIGHED, LEAST_ESS, KEPT = 40_000, 4_000, 20_000  # draws of each half of the mixture
CHAINS, ITERATIONS, FORGOTTEN = 256, 200, 50
STALE = 0.1  # correlation of a chain's latent with where it was half of its length before

# A fault is one of these at least; what is below all of the others is right, and what is neither is not counted.
FAULT = {"mean": 0.3, "sd": math.log(4.0 / 3.0), "tail": 0.5, "dependence": 0.5, "mass": 0.1}
RIGHT = {"mean": 0.1, "sd": 0.1, "tail": 0.5, "dependence": 0.25, "mass": 0.05}


def fitted(model, args, seed=0, **limits):
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), args, progress=False, seed=seed, **limits)
    return guide


def container(model, guide, args, draws, seed=1, check=True):
    return dgm.from_svi(model, guide, *args, num_samples=draws, prior=0, posterior_predictive=False, log_likelihood=False,
                        seed=seed, check=check, container="dict")  # fmt: skip


def flat(draws):
    """Draws by site, ``(n, F)``, sites in the order of their names."""
    return np.concatenate([np.asarray(draws[k]).reshape(len(draws[k]), -1) for k in sorted(draws)], -1).astype(float)


# --- Guides whose draws are moved ---


class Bent(WhitenedPosterior):
    """A posterior whose vectors are moved by a transform."""

    def bijection(self, built):
        return composed([super().bijection(built), self.bend])


@contextmanager
def bent(guide, bend):
    """A guide over one vector, its draws moved; as it was afterwards."""
    kept = guide._posterior.components
    moved = []
    for each in kept:
        moved.append(copy(each))
        moved[-1].__class__, moved[-1].bend = Bent, bend
    guide._posterior.components = nn.ModuleList(moved)
    try:
        yield guide
    finally:
        guide._posterior.components = kept


class Linear(Transform):
    """Vectors x to c + s + A (x - c)."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, centre, matrix, shift=0.0):
        super().__init__()
        self.centre, self.matrix, self.shift = centre, matrix, shift

    def _call(self, x):
        return self.centre + self.shift + (x - self.centre) @ self.matrix.T

    def _inverse(self, y):
        return self.centre + torch.linalg.solve(self.matrix, (y - self.centre - self.shift)[..., None])[..., 0]

    def log_abs_det_jacobian(self, x, y):
        return torch.linalg.slogdet(self.matrix).logabsdet.expand(x.shape[:-1])


# --- References ---


@dataclass
class Reference:
    """Draws ``(n, F)`` of the posterior, where they come from, and the places ``(K, F)`` of its modes where it has several."""

    draws: np.ndarray
    source: str
    places: np.ndarray | None = None


def reference_of(case, guide):
    """None where there is none to be had."""
    if case.exact is not None:
        return Reference(flat(case.exact), "exact", case.places)
    with torch.no_grad():
        found = None if guide.follows_structure else by_weights(guide, case.model, case.args)
        return found or by_chains(guide, case.model, case.args)


def by_weights(guide, model, args):
    log_joint, q = LogJoint(guide, model, args, {}), guide.get_posterior(*args)
    u = q.sample((WEIGHED,))
    log_q = q.log_prob(u)
    wider = Linear(u.mean(0), 2.0 * torch.eye(u.shape[-1]))
    with bent(guide, wider):
        wide = guide.get_posterior(*args)
        more = wide.sample((WEIGHED,))
        log_wide = wide.log_prob(torch.cat([u, more]))
    u, log_q = torch.cat([u, more]), torch.cat([log_q, q.log_prob(more)])
    log_p = torch.cat([log_joint(some) for some in u.split(4096)])
    weight = (log_p - torch.logaddexp(log_q, log_wide)).softmax(0)
    if not 1.0 / weight.square().sum() > LEAST_ESS:
        return None
    rng = np.random.default_rng(0)
    index = rng.permutation(stratified(weight.numpy(), KEPT, rng.random(KEPT)))
    return Reference(flat({k: v.numpy() for k, v in log_joint.constrain(u[index])[0].items()}), "weights")


def by_chains(guide, model, args):
    if guide.modes > 1:
        return None
    log_joint = LogJoint(guide, model, args, {})
    density = PulledBack(log_joint, guide.get_transform(*args))
    start = density.transform.inv(guide.get_posterior(*args).sample((CHAINS,)))
    moves = zip(range(ITERATIONS), trajectories(density, start), strict=False)
    z = torch.stack([moved.z for i, moved in moves if i >= FORGOTTEN])
    u = density.transform(z.flatten(0, 1)).reshape(z.shape)
    early, late = ((x - x.mean(0)) / x.std(0) for x in (u[0], u[len(u) // 2]))
    if not float((early * late).mean(0).abs().max()) < STALE + 4.0 / CHAINS**0.5:
        return None
    values = log_joint.constrain(u[::2].flatten(0, 1))[0]
    return Reference(flat({k: v.numpy() for k, v in values.items()}), "chains")


# --- How far draws are from it ---


def sizes(draws, reference):
    """Largest error of a mean (in sd), of a log sd, of the tails, of a correlation, and of a mode's mass.

    Draws are clamped to the reference's range from .1 to 99.9 %, since the sd of a heavy tail says nothing. Tails are compared by
    how many draws are beyond the reference's 1 % and 99 % quantiles, told as sds of a normal law: .5 is 3.4 or .23 % for 1 %. In
    sds of the latent itself (``quantile``) the same would be more or less where it is skewed.
    """
    low, high = np.quantile(reference.draws, [0.001, 0.999], axis=0)
    p, q = reference.draws.clip(low, high), draws.clip(low, high)
    moving = p.std(0) > 1e-9
    p, q = p[:, moving], q[:, moving]
    sd = p.std(0)
    return {"mean": float(np.abs((q.mean(0) - p.mean(0)) / sd).max()), "sd": float(np.abs(np.log(q.std(0).clip(1e-12) / sd)).max()),
            **tails(draws[:, moving], reference.draws[:, moving], sd), "dependence": float(np.abs(correlations(q) - correlations(p)).max()),
            "mass": masses_off(draws, reference), "central": central_off(q, p, sd)}  # fmt: skip


def central_off(draws, exact, sd):
    """Largest error of a quantile from 5 to 95 %, in sds."""
    own, truth = (np.quantile(x, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0) for x in (draws, exact))
    return float((np.abs(own - truth) / sd).max())


def tails(draws, exact, sd):
    """How far the 1 % and 99 % ends are off, by the share beyond them and by place."""
    ends, own = (np.quantile(x, [0.01, 0.99], axis=0) for x in (exact, draws))
    beyond = np.stack([(draws < ends[0]).mean(0), (draws > ends[1]).mean(0)]).clip(0.5 / len(draws), 0.999)
    return {
        "tail": float(np.abs(norm.ppf(beyond) - norm.ppf(0.01)).max()),
        "quantile": float((np.abs(own - ends) / sd).max()),
    }


def correlations(x):
    return np.nan_to_num(np.atleast_2d(np.corrcoef(x, rowvar=False)))


def masses_off(draws, reference):
    """The most that a mode has too little or too much."""
    if reference.places is None:
        return 0.0
    nearest = lambda x: ((x[:, None] - reference.places) ** 2).sum(-1).argmin(1)
    share = lambda x: np.bincount(nearest(x), minlength=len(reference.places)) / len(x)
    return float(np.abs(share(draws) - share(reference.draws)).max())


def truth(found):
    if any(found[k] >= FAULT[k] for k in FAULT):
        return "fault"
    return "right" if all(found[k] < RIGHT[k] for k in RIGHT) else "between"
