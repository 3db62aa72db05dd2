"""Groups with an intercept and a slope, six data each: the model, its data, and exact numbers.

With normal data the groups are summed out by hand (sums over the data of a group are all that is needed), and the five globals follow
by importance sampling from a normal law at the mode. With counts and yes-or-no data the globals are the guide's own draws, weighted
by a quadrature of 11 points each way.
"""

import math

import pyro
import pyro.distributions as dist
import torch

from pyro_dgm.guides.plates import Rule
from pyro_dgm.model.log_joint import LogJoint

EACH = 6
NAMES = ("mu_a", "sd_a", "mu_b", "sd_b", "sigma")
DRAWS, OF_GROUPS = 4_000, 500


def drawn(kind, groups, seed):
    """``group, x, y`` of all data."""
    generator = torch.Generator().manual_seed(seed)
    a = 1.0 + 0.7 * torch.randn(groups, generator=generator)
    b = -0.5 + 0.4 * torch.randn(groups, generator=generator)
    group = torch.arange(groups).repeat_interleave(EACH)
    x = torch.randn(groups * EACH, generator=generator)
    pyro.set_rng_seed(seed)
    return group, x, likelihood(kind, a[group] + b[group] * x, 0.6).sample()


def likelihood(kind, eta, sigma=None):
    if kind == "normal":
        return dist.Normal(eta, sigma)
    return dist.Poisson(eta.exp()) if kind == "poisson" else dist.Bernoulli(logits=eta)


def model(kind, groups):
    def slopes(group, x, y):
        mu_a = pyro.sample("mu_a", dist.Normal(0.0, 5.0))
        sd_a = pyro.sample("sd_a", dist.HalfNormal(2.0))
        mu_b = pyro.sample("mu_b", dist.Normal(0.0, 5.0))
        sd_b = pyro.sample("sd_b", dist.HalfNormal(2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0)) if kind == "normal" else None
        with pyro.plate("group", groups):
            a = pyro.sample("a", dist.Normal(mu_a, sd_a))
            b = pyro.sample("b", dist.Normal(mu_b, sd_b))
        with pyro.plate("data", len(y)):
            pyro.sample("y", likelihood(kind, a[..., group] + b[..., group] * x, sigma), obs=y)

    return slopes


class Exact:
    """Normal data: the globals are ``mu_a, log sd_a, mu_b, log sd_b, log sigma``."""

    def __init__(self, group, x, y):
        groups = int(group.max()) + 1
        summed = lambda v: torch.zeros(groups).double().index_add(0, group, v.double())
        self.n, self.x, self.xx = summed(torch.ones_like(x)), summed(x), summed(x * x)
        self.y, self.xy, self.yy = summed(y), summed(x * y), float(y.double().square().sum())

    def given(self, g):
        """Of globals ``(n, 5)``: log determinants, what data say beside the mean, and means and variances of both latents."""
        a, b = g[:, :1], g[:, 2:3]
        va, vb, v = ((2.0 * g[:, i : i + 1]).exp() for i in (1, 3, 4))
        c0, c1 = self.y - self.n * a - self.x * b, self.xy - self.x * a - self.xx * b
        m00, m11 = v / va + self.n, v / vb + self.xx
        det = m00 * m11 - self.x**2
        log_det = (det * va * vb / v**2).log()
        mean0, mean1 = (m11 * c0 - self.x * c1) / det, (m00 * c1 - self.x * c0) / det
        fit = self.yy - 2.0 * (a * self.y + b * self.xy).sum(-1)
        fit = fit + (self.n * a**2 + 2.0 * self.x * a * b + self.xx * b**2).sum(-1)
        gain = (c0 * mean0 + c1 * mean1).sum(-1)
        moments = (a + mean0, v * m11 / det), (b + mean1, v * m00 / det)
        return log_det.sum(-1), (fit - gain) / v[:, 0], moments

    def __call__(self, g):
        """The log density of the globals and the data."""
        log_det, square, _ = self.given(g)
        total = -0.5 * (log_det + square) - float(self.n.sum()) * (g[:, 4] + 0.5 * math.log(2.0 * math.pi))
        scales = g[:, [1, 3, 4]]
        prior = dist.Normal(0.0, 5.0).log_prob(g[:, [0, 2]]).sum(-1)
        return total + prior + (dist.HalfNormal(2.0).log_prob(scales.exp()) + scales).sum(-1)

    def drawn(self, start):
        """Globals, normalised weights, and the log evidence."""
        g = start.double().clone()
        for _ in range(20):
            slope = torch.autograd.functional.jacobian(lambda u: self(u[None])[0], g)
            curved = torch.autograd.functional.hessian(lambda u: self(u[None])[0], g)
            g = g - torch.linalg.solve(curved, slope)
        tril = torch.linalg.cholesky(torch.linalg.inv(-curved)) * 1.1
        proposal = torch.distributions.MultivariateNormal(g, scale_tril=tril)
        draws = proposal.sample((DRAWS,))
        log_weight = torch.cat([self(some) for some in draws.split(100)]) - proposal.log_prob(draws)
        return draws, log_weight.softmax(0), float(log_weight.logsumexp(0)) - math.log(DRAWS)

    def groups(self, draws, weight):
        """Means and sds of intercepts and slopes, ``(J, 2)``."""
        kept = draws[torch.multinomial(weight, OF_GROUPS, replacement=True)]
        parts = [self.given(some)[2] for some in kept.split(100)]
        found = []
        for k in (0, 1):
            mean, variance = (torch.cat([p[k][i] for p in parts]) for i in (0, 1))
            found.append((mean.mean(0), (mean.var(0) + variance.mean(0)).sqrt()))
        return tuple(torch.stack(x, -1) for x in zip(*found, strict=True))


def weighted(kind, guide, data, count=500):
    """Globals of the guide, their weights by the finest quadrature, and the log evidence."""
    joint = LogJoint.known(guide, model(kind, int(data[0].max()) + 1), data, {})
    own = guide.plated
    with torch.no_grad():
        g = own.outer().sample((count,))
        log_weight = own.marginal(guide.factors_of(joint), g, Rule(11)) - own.outer().log_prob(g).double()
    return g.double(), log_weight.softmax(0), float(log_weight.logsumexp(0)) - math.log(count)
