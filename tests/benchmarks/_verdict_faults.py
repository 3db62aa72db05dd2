"""Faults planted in a fitted guide over one vector, and guides of the wrong data, model, prior or number of steps."""

import math
import zlib
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import pyro
import torch
from pyro import poutine
from torch.distributions import Transform, constraints

import pyro_dgm as dgm
from tests.benchmarks import verdicts_large
from tests.benchmarks._verdict_truth import Linear, bent, fitted


class Tails(Transform):
    """Some entries of a vector by sinh(d asinh(t) + e), in units, with slope one in the middle: d > 1 has heavier tails, e skews."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc, sd, weight, skew, chosen):
        super().__init__()
        self.loc, self.sd, self.d, self.e, self.chosen = loc, sd, weight, skew, chosen
        self.slope = weight * math.cosh(skew)

    def _call(self, x):
        t = (x - self.loc) / self.sd
        moved = ((self.d * t.asinh() + self.e).sinh() - math.sinh(self.e)) / self.slope
        return torch.where(self.chosen, self.loc + self.sd * moved, x)

    def _inverse(self, y):
        t = (y - self.loc) / self.sd
        moved = (((t * self.slope + math.sinh(self.e)).asinh() - self.e) / self.d).sinh()
        return torch.where(self.chosen, self.loc + self.sd * moved, y)

    def log_abs_det_jacobian(self, x, y):
        t = (x - self.loc) / self.sd
        slope = (self.d * t.asinh() + self.e).cosh().log() + math.log(self.d / self.slope) - 0.5 * (1.0 + t * t).log()
        return torch.where(self.chosen, slope, 0.0).sum(-1)


class Moments:
    """Of a guide's vectors, and random numbers that belong to the posterior's name."""

    def __init__(self, guide, args, name):
        u = guide.get_posterior(*args).sample((8192,))
        self.mean, self.cov, self.dim = u.mean(0), torch.cov(u.T).reshape(u.shape[-1], -1), u.shape[-1]
        self.sd = self.cov.diagonal().sqrt()
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def uniform(self, low, high):
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def sign(self):
        return 1.0 if self.uniform(0.0, 1.0) < 0.5 else -1.0

    def one(self):
        """A latent, at random."""
        return int(torch.randint(self.dim, (), generator=self.generator))

    def scaled(self, factors):
        return Linear(self.mean, torch.diag(factors))

    def shifted(self, shift):
        return Linear(self.mean, torch.eye(self.dim), shift)


def bends(m):
    """Kind, what exactly, and the transform of every fault that is one."""
    j, eye, size = m.one(), torch.eye(m.dim), m.uniform(0.35, 1.0)
    yield "shifted", f"one latent by {size:.2f} sd", m.shifted(m.sign() * size * m.sd[j] * eye[j])
    toward = torch.linalg.cholesky(m.cov) @ torch.randn(m.dim, generator=m.generator)
    size = m.uniform(0.4, 0.8)
    yield "shifted", f"along a direction by {size:.2f} sd", m.shifted(size * toward / (toward / m.sd).abs().max())
    for kind, low, high in (("too narrow", 0.5, 0.7), ("too wide", 1.45, 2.0)):
        factor = m.uniform(low, high)
        yield kind, f"all by {factor:.2f}", m.scaled(torch.full((m.dim,), factor))
        if m.dim > 1:
            j, factor = m.one(), m.uniform(low, high)
            yield kind, f"one latent by {factor:.2f}", m.scaled(torch.where(eye[j] > 0, factor, 1.0))
    for some in (eye[m.one()] > 0, torch.ones(m.dim, dtype=torch.bool))[: 1 + (m.dim > 1)]:
        heavy, skew = ((1.4, 0.0), (0.35, 0.0), (1.0, 0.5 * m.sign()))[int(m.uniform(0.0, 3.0))]
        which = "all" if some.all() else "one latent"
        yield "wrong tail", f"{which}, {heavy:.2f}, skew {skew:.1f}", Tails(m.mean, m.sd, heavy, skew, some)
    if m.dim > 1:
        yield dependence(m)


def dependence(m):
    """Two latents whose correlation is .65 off, margins as they were (of normals)."""
    i = m.one()
    j = (i + 1 + int(m.uniform(0.0, m.dim - 1.0))) % m.dim
    old = float(m.cov[i, j] / m.sd[i] / m.sd[j])
    new = old - 0.65 if old > 0 else old + 0.65
    root = lambda r: torch.diag(m.sd[[i, j]]) @ torch.linalg.cholesky(torch.tensor([[1.0, r], [r, 1.0]]))
    matrix = torch.eye(m.dim)
    pair = torch.tensor([i, j])
    matrix[pair[:, None], pair] = root(new) @ root(old).inverse()
    return "wrong dependence", f"{old:.2f} -> {new:.2f}", Linear(m.mean, matrix)


@contextmanager
def of_modes(guide, index, log_weight):
    """Some components, with these weights; as it was afterwards."""
    own = guide._posterior
    kept = own.components, own.log_weight
    own.components, own.log_weight = torch.nn.ModuleList([kept[0][i] for i in index]), log_weight
    try:
        yield guide
    finally:
        own.components, own.log_weight = kept


def lost_modes(guide):
    """Each of the first three modes left out, each alone, and weights that are upside down."""
    weight, every = guide._posterior.log_weight, range(guide.modes)
    for lost in list(every)[:3]:
        rest = [i for i in every if i != lost]
        yield "lost mode", f"without {weight[lost].exp():.2f}", of_modes(guide, rest, weight[rest].log_softmax(0))
    if guide.modes > 2:
        least = int(weight.argmin())
        yield "wrong mode", f"only {weight[least].exp():.2f}", of_modes(guide, [least], torch.zeros(1))
    moved = (
        (-weight).softmax(0).log()
        if weight.exp().max() > 0.6
        else torch.linspace(0.2, 1.0, guide.modes).log().log_softmax(0)
    )
    yield (
        "modes weighed wrongly",
        f"{weight.exp().tolist()[0]:.2f} -> {moved.exp().tolist()[0]:.2f}",
        of_modes(guide, every, moved),
    )


def normal(model, args, like, loc, scale_tril):
    """An untrained guide that is this normal law."""
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model, structure="joint").setup(*args)
    if hasattr(like, "centre"):
        guide.centre.copy_(like.centre)
    guide._posterior.components[0].whiten(loc, scale_tril)
    return guide


def stopped_early(case, steps):
    pyro.clear_param_store()
    guide = dgm.AutoFlow(case.model, structure="joint").setup(*case.args)
    svi = pyro.infer.SVI(case.model, guide, pyro.optim.Adam({"lr": 5e-3}), dgm.STL_ELBO())
    for _ in range(steps):
        svi.step(*case.args)
    return guide


def float32(case, seed):
    """Fitted in float32; its parameters as they are then, in float64."""
    torch.set_default_dtype(torch.float32)
    try:
        single = tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.args)
        guide = fitted(case.model, single, seed)
    finally:
        torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    double = dgm.AutoFlow(case.model, structure="joint").setup(*case.args)
    double._posterior.load_state_dict(guide._posterior.state_dict())
    return double


def stock(case):
    """Pyro's mean field, which has no vector of all latents."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = pyro.infer.autoguide.AutoNormal(case.model, init_scale=0.3)
    optimiser = pyro.optim.ClippedAdam({"lr": 2e-2, "lrd": 0.998})
    svi = pyro.infer.SVI(case.model, guide, optimiser, pyro.infer.Trace_ELBO(16, vectorize_particles=True))
    for _ in range(600):
        svi.step(*case.args)
    return guide


def blocked(case, site):
    """A guide that does not know a site, as it was made: a fit draws it from the prior."""
    pyro.clear_param_store()
    hidden = poutine.block(case.model, hide=[site])
    return dgm.AutoFlow(hidden, structure="joint").setup(*case.args)


def faults(case, name, guide):
    """Kind, what exactly, and a context in which the guide has the fault."""
    m = Moments(guide, case.args, name)
    for kind, what, bend in bends(m):
        yield kind, what, bent(guide, bend)
    if guide.modes > 1:
        yield from lost_modes(guide)
    elif m.dim > 1:
        precision = torch.linalg.inv(m.cov)
        tril = torch.diag(precision.diagonal().rsqrt())
        yield "mean field", "", nullcontext(normal(case.model, case.args, guide, m.mean, tril))
        yield "normal law", "", nullcontext(normal(case.model, case.args, guide, m.mean, torch.linalg.cholesky(m.cov)))
    steps = (1, 30, 200)[int(m.uniform(0.0, 3.0))]
    yield "stopped early", f"{steps} steps", nullcontext(stopped_early(case, steps))
    for kind, (model, args) in case.others.items():
        yield kind, "", nullcontext(fitted(model, args))
    if case.stock:
        yield "lost mode, AutoNormal" if guide.modes > 1 else "AutoNormal", "", nullcontext(stock(case))
    if case.single:
        yield "float32", "", nullcontext(float32(case, 0))
    if case.block:
        yield "site blocked", case.block, nullcontext(blocked(case, case.block))


# --- Guides that follow plates ---


@contextmanager
def in_place(guide, plant):
    kept = deepcopy(guide._posterior.state_dict())
    with torch.no_grad():
        plant(guide)
    try:
        yield guide
    finally:
        guide._posterior.load_state_dict(kept)


def plated_faults(case, guide):
    """Of the globals, of the elements of plates, and guides of the wrong data."""
    for what, plant in (verdicts_large.FAULTS | ({} if guide.follows_chain else verdicts_large.OF_ELEMENTS)).items():
        yield "many elements", what, in_place(guide, plant)
    for kind, (model, args) in case.others.items():
        yield kind, "", nullcontext(fitted(model, args))
