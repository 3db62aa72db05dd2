"""A neuron's spikes, or the absence of one, in 100 bins, given its response to white noise: a Bernoulli GLM.

Ten parameters, an offset and a filter of nine bins. The data are the spikes themselves (``bernoulli_glm_raw``) or their
sufficient statistics, the number of spikes and the input summed before each of them (``bernoulli_glm``).
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.benchmarks._sbi_exact import log_concave

BINS, FILTER = 100, 9
SEED = 42  # of the input, which the benchmark keeps fixed


def design():
    """Ones, then the input of this bin and of each of the eight before: ``(BINS, 1 + FILTER)``."""
    noise = np.random.RandomState(SEED).randn(BINS)
    columns = [np.ones(BINS)] + [np.concatenate([np.zeros(lag), noise[: BINS - lag]]) for lag in range(FILTER)]
    return torch.tensor(np.stack(columns, -1), dtype=torch.float32)


def precision():
    """The prior's: variance 2 of the offset; second differences of the filter are normal."""
    step = torch.eye(FILTER) - torch.eye(FILTER).roll(1, 0).tril()
    root = step @ step + torch.diag(torch.arange(FILTER) / FILTER).sqrt()
    return torch.block_diag(torch.tensor([[0.5]]), root.T @ root)


DESIGN, PRECISION = design(), precision()


class SpikeStatistics(dist.TorchDistribution):
    """``design.T @ spikes`` of independent spikes with these logits, ``design @ theta``.

    ``log_prob`` leaves out the number of spike trains with these statistics, which says nothing about ``theta``.
    """

    arg_constraints = {"theta": constraints.real_vector}
    support = constraints.real_vector

    def __init__(self, theta):
        self.theta = theta
        super().__init__(theta.shape[:-1], theta.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return SpikeStatistics(self.theta.expand(*batch_shape, 1 + FILTER))

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.theta.shape[:-1] + (BINS,)
        spikes = torch.rand(shape) < (self.theta @ DESIGN.T).sigmoid()
        return spikes.to(DESIGN) @ DESIGN

    def log_prob(self, value):
        return (self.theta * value).sum(-1) - torch.nn.functional.softplus(self.theta @ DESIGN.T).sum(-1)


def parameters():
    return pyro.sample("theta", dist.MultivariateNormal(torch.zeros(1 + FILTER), precision_matrix=PRECISION))


def bernoulli_glm(data=None):
    return pyro.sample("data", SpikeStatistics(parameters()), obs=data)


def bernoulli_glm_raw(data=None):
    spikes = dist.Bernoulli(logits=parameters() @ DESIGN.T, validate_args=False).to_event(1)
    return pyro.sample("data", spikes, obs=data)


def exact_glm(statistics, n):
    statistics, inputs, weight = statistics.double(), DESIGN.double(), PRECISION.double()

    def log_density(t):
        spikes = (t * statistics).sum(-1) - torch.nn.functional.softplus(t @ inputs.T).sum(-1)
        return spikes - 0.5 * ((t @ weight) * t).sum(-1)

    return log_concave(log_density, 1 + FILTER, n).float()


def exact_glm_raw(spikes, n):
    return exact_glm(spikes @ DESIGN, n)
