"""Ten tasks of simulation-based inference as Pyro models, with exact posterior draws for any observation.

The definitions are those of Lueckmann et al. (2021), "Benchmarking simulation-based inference", arXiv 2101.04653. The
density of two_moons has the polar Jacobian 1 / r, as its simulator does. The distractors of slcp_distractors follow the paper's
text with random numbers of our own.
"""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.benchmarks._sbi_glm import bernoulli_glm, bernoulli_glm_raw, exact_glm, exact_glm_raw
from tests.benchmarks._sbi_odes import exact_ode, lotka_volterra, sir


class Crescent(dist.TorchDistribution):
    """A half circle of radius 0.1 and width 0.01, moved by ``shift``."""

    arg_constraints = {"shift": constraints.real_vector}
    support = constraints.real_vector

    def __init__(self, shift):
        self.shift = shift
        super().__init__(shift.shape[:-1], shift.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Crescent(self.shift.expand(*batch_shape, 2))

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.batch_shape
        angle, radius = math.pi * (torch.rand(shape) - 0.5), 0.1 + 0.01 * torch.randn(shape)
        return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1) + self.shift

    def log_prob(self, value):
        u, v = (value - self.shift - torch.tensor([0.25, 0.0])).unbind(-1)
        radius = (u.square() + v.square()).sqrt()
        inside = dist.Normal(0.1, 0.01).log_prob(radius) - math.log(math.pi) - radius.log()
        return torch.where(u >= 0.0, inside, -torch.inf)


def box(bound, dim):
    return dist.Uniform(torch.full((dim,), -bound), torch.full((dim,), bound)).to_event(1)


def two_moons(data=None):
    t = pyro.sample("theta", box(1.0, 2))
    shift = torch.stack([-(t[..., 0] + t[..., 1]).abs(), t[..., 1] - t[..., 0]], -1) / math.sqrt(2.0)
    return pyro.sample("data", Crescent(shift), obs=data)


def gaussian_mixture(data=None):
    t = pyro.sample("theta", box(10.0, 2))
    parts = dist.Normal(t[..., None, :], torch.tensor([[1.0], [0.1]])).to_event(1)
    return pyro.sample(
        "data", dist.MixtureSameFamily(dist.Categorical(torch.full((*t.shape[:-1], 2), 0.5)), parts), obs=data
    )


def gaussian_linear_uniform(data=None):
    t = pyro.sample("theta", box(1.0, 10))
    return pyro.sample("data", dist.Normal(t, math.sqrt(0.1)).to_event(1), obs=data)


def gaussian_linear(data=None):
    t = pyro.sample("theta", dist.Normal(torch.zeros(10), math.sqrt(0.1)).to_event(1))
    return pyro.sample("data", dist.Normal(t, math.sqrt(0.1)).to_event(1), obs=data)


def cholesky(t):
    """Of the covariance that the last three of five parameters make."""
    a, b, rho = t[..., 2].square(), t[..., 3].square(), t[..., 4].tanh()
    first = (a.square() + 1e-6).sqrt()
    below = rho * a * b / first
    last = (b.square() + 1e-6 - below.square()).clamp_min(1e-12).sqrt()
    return torch.stack([torch.stack([first, 0.0 * first], -1), torch.stack([below, last], -1)], -2)


def points(t):
    """Four points of a plane, normal with a mean and covariance of their own, side by side in a vector of eight."""
    loc, tril = t[..., :2], cholesky(t)
    each = dist.MultivariateNormal(loc[..., None, :], scale_tril=tril[..., None, :, :], validate_args=False)
    each = each.expand((*t.shape[:-1], 4)).to_event(1)
    return dist.TransformedDistribution(each, dist.transforms.ReshapeTransform((4, 2), (8,)))


def slcp(data=None):
    t = pyro.sample("theta", box(3.0, 5))
    return pyro.sample("data", points(t), obs=data)


class Distracted(dist.TorchDistribution):
    """The eight numbers of slcp among 92 of a mixture of t's that has nothing to do with the parameters, in a fixed order.

    ``log_prob`` leaves out the mixture's density: it says nothing about ``t``, and its triangular factors are too ill
    conditioned to be solved with.
    """

    arg_constraints = {"t": constraints.real_vector}
    support = constraints.real_vector
    dim, parts = 92, 20

    def __init__(self, t):
        self.t = t
        super().__init__(t.shape[:-1], torch.Size([8 + self.dim]), validate_args=False)
        generator = torch.Generator().manual_seed(42)
        normal = lambda *shape: torch.randn(shape, generator=generator)
        self.loc = 15.0 * normal(self.parts, self.dim)
        diagonal = torch.diag_embed(normal(self.parts, self.dim).exp())
        self.tril = 3.0 * (normal(self.parts, self.dim, self.dim).tril(-1) + diagonal)
        self.order = torch.randperm(8 + self.dim, generator=generator)

    def expand(self, batch_shape, _instance=None):
        return Distracted(self.t.expand(*batch_shape, 5))

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.batch_shape
        part, noise = torch.randint(self.parts, shape), torch.randn(*shape, self.dim)
        for k in range(self.parts):
            noise[part == k] = noise[part == k] @ self.tril[k].T
        noise = self.loc[part] + noise / dist.Gamma(1.0, 1.0).sample((*shape, 1)).sqrt()
        return torch.cat([points(self.t).sample(sample_shape), noise], -1)[..., self.order]

    def log_prob(self, value):
        return points(self.t).log_prob(value[..., self.order.argsort()[:8]])


def slcp_distractors(data=None):
    t = pyro.sample("theta", box(3.0, 5))
    return pyro.sample("data", Distracted(t), obs=data)


MODELS = (
    two_moons, gaussian_mixture, gaussian_linear_uniform, slcp, slcp_distractors, gaussian_linear, bernoulli_glm,
    bernoulli_glm_raw, sir, lotka_volterra,
)  # fmt: skip
TASKS = {f.__name__: f for f in MODELS}
BOUND = {"two_moons": 1.0, "gaussian_mixture": 10.0, "gaussian_linear_uniform": 1.0, "slcp": 3.0}


def prior(task):
    return pyro.poutine.trace(TASKS[task]).get_trace().nodes["theta"]["fn"]


def simulations(task, n, seed):
    """``n`` draws of parameters and data, the same for every method."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        trace = pyro.poutine.trace(pyro.plate("n", n)(TASKS[task])).get_trace()
    return trace.nodes["theta"]["value"], trace.nodes["data"]["value"]


def exact_posterior(task, x, n, seed=0):
    """``n`` draws of the exact posterior of one observation."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return _in_box(task, x, n) if task in BOUND else EXACT[task](x, n)


def _in_box(task, x, n):
    """By inversion and rejection."""
    propose = {"two_moons": _two_moons, "gaussian_mixture": _mixture, "gaussian_linear_uniform": _truncated,
               "slcp": _slcp}[task]  # fmt: skip
    kept, total = [], 0
    for _ in range(1_000):
        t = propose(x, 4 * n)
        kept.append(t[(t.abs() <= BOUND[task]).all(-1)])
        total += len(kept[-1])
        if total >= n:
            return torch.cat(kept)[:n]
    raise RuntimeError(f"{task}: {total} draws of {n} lie in the box.")


EXACT = {
    "slcp_distractors": lambda x, n: _in_box("slcp", x[Distracted(torch.zeros(5)).order.argsort()[:8]], n),
    "gaussian_linear": lambda x, n: x / 2.0 + math.sqrt(0.05) * torch.randn(n, 10),
    "bernoulli_glm": exact_glm,
    "bernoulli_glm_raw": exact_glm_raw,
    "sir": partial(exact_ode, "sir"),
    "lotka_volterra": partial(exact_ode, "lotka_volterra"),
}


def _two_moons(x, n):
    shift = x - Crescent(torch.zeros(n, 2)).sample()
    total = shift[:, 0] * math.sqrt(2.0) * (2.0 * torch.randint(2, (n,)) - 1.0)
    difference = shift[:, 1] * math.sqrt(2.0)
    t = torch.stack([total - difference, total + difference], -1) / 2.0
    return t[shift[:, 0] <= 0.0]


def _mixture(x, n):
    return x + torch.tensor([1.0, 0.1])[torch.randint(2, (n, 1))] * torch.randn(n, 2)


def _truncated(x, n):
    normal = dist.Normal(x, math.sqrt(0.1))
    low, high = normal.cdf(torch.tensor(-1.0)), normal.cdf(torch.tensor(1.0))
    return normal.icdf(low + (high - low) * torch.rand(n, 10)).clamp(-1.0, 1.0)


def _slcp(x, n, cells=160):
    """Scales and correlation from a grid of their density, corrected within the cells; the mean given them is normal."""
    points = x.reshape(4, 2).double()
    centre, width = points.mean(0), 6.0 / cells
    scatter = (points - centre).T @ (points - centre)

    def log_density(t3):
        tril = cholesky(torch.cat([t3.new_zeros(*t3.shape[:-1], 2), t3], -1))
        whitened = torch.linalg.solve_triangular(tril, torch.linalg.cholesky(scatter).expand_as(tril), upper=False)
        return -3.0 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * whitened.square().sum((-2, -1))

    edge = (torch.arange(cells, dtype=torch.float64) + 0.5) * width - 3.0
    half = edge[cells // 2 :]  # the sign of a scale says nothing
    grid = torch.cartesian_prod(half, half, edge)
    score = torch.cat([log_density(g) for g in grid.split(200_000)])
    index = torch.multinomial((score - score.max()).exp(), 20 * n, replacement=True)
    t3 = grid[index] + width * (torch.rand(20 * n, 3, dtype=torch.float64) - 0.5)
    t3 = t3[torch.multinomial((log_density(t3) - score[index]).clamp_max(10.0).exp(), n, replacement=False)]
    t3[:, :2] *= 2.0 * torch.randint(2, (n, 2)) - 1.0
    tril = cholesky(torch.cat([t3.new_zeros(n, 2), t3], -1))
    mean = centre + (tril @ torch.randn(n, 2, 1, dtype=torch.float64))[..., 0] / 2.0
    return torch.cat([mean, t3], -1).float()
