"""Chains from draws of a guide: they stay where it is right, and tell where it is not."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.model.hmc import deviation, near_in_each, opposite, trajectories
from pyro_dgm.model.log_joint import LogJoint, PulledBack

SIZE = 60
FAR = torch.cat([torch.ones(1), torch.zeros(SIZE - 1)])


def normal(size=SIZE):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    return model


def away(loc, tril):
    """How far chains leave the guide N(loc, tril tril^T) of a standard normal model."""
    pyro.set_rng_seed(0)
    guide = dgm.AutoFlow(normal()).setup()
    guide._posterior.components[0].whiten(loc, tril)
    with torch.no_grad():
        density = PulledBack(LogJoint(guide, normal(), (), {}), guide.get_transform())
        return deviation(density, guide.get_posterior())


def correlated(r):
    matrix = torch.eye(SIZE)
    matrix[0, 1] = matrix[1, 0] = r
    return torch.linalg.cholesky(matrix)


def squeezed(factor):
    """Of one direction in which all latents take part."""
    unit = torch.ones(SIZE, dtype=torch.float64) / math.sqrt(SIZE)
    return torch.linalg.cholesky(torch.eye(SIZE).double() - (1.0 - factor**2) * torch.outer(unit, unit)).float()


FAULTS = {
    "one latent moved": (0.25 * FAR, torch.eye(SIZE)),
    "one latent too narrow": (0.0 * FAR, torch.diag(1.0 - 0.25 * FAR)),
    "one latent too wide": (0.0 * FAR, torch.diag(1.0 + 0.3 * FAR)),
    "two latents correlated": (0.0 * FAR, correlated(0.5)),
    "all moved a little": (torch.full((SIZE,), 0.05), torch.eye(SIZE)),
    "a direction too narrow": (0.0 * FAR, squeezed(0.75)),
}


def test_chains_stay_at_a_right_guide():
    assert away(0.0 * FAR, torch.eye(SIZE)) < 0.08


@pytest.mark.parametrize("fault", FAULTS)
def test_chains_leave_a_guide_whose_gap_is_small(fault):
    """Each fault is of less than .01 nats a latent, and larger than what the verdict lets pass."""
    assert 0.1 < away(*FAULTS[fault]) < math.inf


def test_a_guide_that_is_far_off_is_not_asked():
    assert away(0.0 * FAR, 0.7 * torch.eye(SIZE)) == math.inf


def test_trajectories_keep_a_normal_law():
    torch.manual_seed(0)
    start = torch.randn(2000, 5)
    *_, last = itertools.islice(trajectories(lambda z: -0.5 * z.square().sum(-1), start), 10)
    assert last.share > 0.6
    assert float(last.z.mean(0).abs().max()) < 0.1 and float(last.z.std(0).log().abs().max()) < 0.08
    assert float((last.z * start).mean(0).abs().max()) < 0.2


def test_chains_start_at_draws_of_the_guide_and_opposite_where_the_base_is_symmetric():
    """Planted: opposites of a Gumbel's draws, where the Gumbel hardly is."""
    for base, symmetric in ((dist.Normal(0.0, 1.0), True), (dist.StudentT(5.0), True), (dist.Gumbel(0.0, 1.0), False)):
        z = base.sample((8, 2))
        starts = opposite(lambda x: base.log_prob(x).sum(-1), z)
        assert bool((starts[4:] == -starts[:4]).all()) == symmetric and bool((starts == z).all()) != symmetric


def test_the_gap_is_counted_by_latent():
    weights = torch.tensor([-0.5, 0.5])
    assert near_in_each(weights, 100) and not near_in_each(weights, 10)
