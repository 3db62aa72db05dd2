"""Whether a distribution on a bounded support is a density, asked with draws of a proposal in the unconstrained space."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_dgm as dgm


def each(constraint):
    return constraints.independent(constraint, 1)


RIGHT = {
    "log-normal": lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
    "gamma with a pole": lambda: dist.Gamma(torch.full((2,), 0.7), 1.0).to_event(1),
    "Dirichlet": lambda: dist.Dirichlet(torch.tensor([0.5, 2.0, 1.0])),
    "beta": lambda: dist.Beta(torch.tensor([0.5, 0.4]), 2.0).to_event(1),
    "positive flow": lambda: dgm.RealNVP(3, support=each(constraints.positive))(),
    "simplex": lambda: dgm.NSF(3, support=constraints.simplex)(),
    "ordered": lambda: dgm.MAF(3, support=dist.constraints.ordered_vector)(),
    "box": lambda: dgm.NSF(2, support=each(constraints.interval(-1.0, 5.0)))(),
    "stacked": lambda: dgm.NSF(2, support=constraints.stack([constraints.positive, constraints.real]))(),
    "chain in a box": lambda: dgm.flows.MixtureChain(2, box=(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 2.0])))(),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_ones_pass(name):
    """Planted faults: a proposal on all real vectors, which was so; no Jacobian of the map onto the support."""
    torch.manual_seed(0)
    total, error = dgm.assert_density(RIGHT[name]())
    assert abs(total - 1.0) < 5 * error and error < 0.02


class Unjacobian(dist.LogNormal):
    """The density of the logarithm, a common fault."""

    def log_prob(self, value):
        return super().log_prob(value) + value.log()


def test_a_density_of_logarithms_is_none_on_the_half_line():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"integrates to \d.* expected 1: no density"):
        dgm.assert_density(dist.Independent(Unjacobian(torch.zeros(2), 1.0), 1))


@pytest.mark.parametrize("q", [dist.Poisson(torch.ones(2)).to_event(1), dist.ProjectedNormal(torch.ones(2))], ids=repr)
def test_supports_without_a_map_are_refused_by_name(q):
    """Planted fault: torch's NotImplementedError, without a name."""
    with pytest.raises(ValueError, match="assert_density: .* has no support of real numbers that torch has a map onto"):
        dgm.assert_density(q)
