"""Mixtures on an interval against quadrature and finite differences, and their chain."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.core.networks import place_and_width
from pyro_dgm.flows import MixtureChain
from pyro_dgm.flows.normal_mixture import NormalMixture

CASES = {  # log weights, places, log scales, ends
    "inside": ([0.0, 1.0], [-0.5, 0.6], [-1.5, -0.5], (-1.0, 1.0)),
    "all places outside": ([0.0, 0.5], [3.0, 4.0], [-1.0, 0.5], (-1.0, 1.0)),
    "far below": ([0.0, 0.0], [-9.0, -8.0], [-0.5, -0.5], (-1.0, 1.0)),
    "half open": ([0.0, 0.0], [0.5, 3.0], [-0.7, 0.0], (0.0, 1e4)),
}


def mixture(case, dtype=torch.float64):
    weight, loc, scale, (low, high) = CASES[case]
    numbers = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (weight, loc, scale)]
    return numbers, (torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype))


@pytest.mark.parametrize("case", CASES)
def test_a_mixture_has_mass_one_on_its_interval_and_draws_of_its_own_cdf(case):
    """Planted fault: the mass of the components without their weights is 0.8 to 1.9 times too much."""
    numbers, interval = mixture(case)
    q = NormalMixture(*numbers, interval)
    high = min(float(interval[1]), 12.0)
    edges = torch.linspace(float(interval[0]), high, 20_001, dtype=torch.float64)
    middle = 0.5 * (edges[1:] + edges[:-1])
    with torch.no_grad():
        density = NormalMixture(*numbers, interval).log_prob(middle).exp()
        assert abs(float(density.sum() * (edges[1] - edges[0])) - 1.0) < 1e-4
        assert (q.log_prob(torch.tensor([interval[0] - 0.1, interval[1] + 0.1])) == -torch.inf).all()
        torch.manual_seed(0)
        x = NormalMixture(*(n.expand(4000, 2) for n in numbers), interval).rsample()
        assert ((x >= interval[0]) & (x <= interval[1])).all()
        u = q.cdf(x).sort().values
        gap = (u - torch.arange(4000) / 4000).abs().max()
    assert float(gap) < 1.95 / math.sqrt(4000)  # Kolmogorov's bound at p = 1e-3


@pytest.mark.parametrize("case", ["inside", "all places outside", "half open"])
def test_draws_have_the_gradient_of_their_mean(case):
    """Against quadrature of the mean. Planted fault: the sign of the implicit derivative."""
    numbers, interval = mixture(case)
    edges = torch.linspace(float(interval[0]), min(float(interval[1]), 12.0), 20_001, dtype=torch.float64)
    middle = 0.5 * (edges[1:] + edges[:-1])
    mean = (NormalMixture(*numbers, interval).log_prob(middle).exp() * middle).sum() * (edges[1] - edges[0])
    exact = torch.autograd.grad(mean, numbers)
    torch.manual_seed(0)
    x = NormalMixture(*(n.expand(100_000, 2) for n in numbers), interval).rsample()
    for found, wanted in zip(torch.autograd.grad(x.mean(), numbers), exact, strict=True):
        assert torch.allclose(found, wanted, atol=0.01), (found, wanted)


@pytest.mark.parametrize("loc", [40.0, 1e3, 46_356.7])
def test_the_mass_of_a_component_thousands_of_sds_outside_has_a_gradient(loc):
    """It is nearly the distance. Planted fault: torch's own log_ndtr, off by 4 % at 1e3 and then NaN, which ended trainings."""
    place = torch.tensor([loc], requires_grad=True)
    q = NormalMixture(torch.zeros(1), place, torch.zeros(1), (torch.tensor(-1.0), torch.tensor(1.0)))
    (gradient,) = torch.autograd.grad(q.log_mass.sum(), place)
    assert abs(float(gradient) / (1.0 - loc) - 1.0) < 2e-3


def test_a_chain_scores_its_draws_and_entries_see_those_before_them_only():
    """Planted fault: one entry's mixture that sees itself makes scores of draws differ from the product of conditionals."""
    torch.manual_seed(0)
    box = (torch.tensor([-1.7, -torch.inf, -1.7]), torch.tensor([1.7, torch.inf, 1.7]))
    family = MixtureChain(3, 2, box=box, hidden_features=(16, 16))
    with torch.no_grad():
        family.net[-1].weight.mul_(30.0)
    context = torch.randn(5, 2)
    q = family(context)
    x = q.sample((7,))
    each = _in_turn(family, x, context)
    assert x.shape == (7, 5, 3) and torch.allclose(
        q.log_prob(x), sum(e.log_prob(x[..., i]) for i, e in enumerate(each)), atol=1e-5
    )
    assert (x[..., [0, 2]].abs() <= 1.7).all() and not (x[..., 1].abs() <= 1.7).all()
    changed = torch.cat([x[..., :1], x[..., 1:] + 1.0], -1)
    seen = zip(_in_turn(family, changed, context), each, strict=True)
    assert [torch.equal(a.loc, b.loc) for a, b in seen] == [True, True, False]


def _in_turn(family, x, context):
    """The mixtures of the entries of x."""
    entries = family.in_turn(context, x.shape[:-1])
    return [next(entries)] + [entries.send(x[..., i]) for i in range(x.shape[-1] - 1)]


def boxed(x=None):
    t = pyro.sample("t", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
    return pyro.sample("x", dist.Normal(t, 0.3).to_event(1), obs=x)


def test_an_elbo_trains_through_the_edge_of_a_box():
    """Minus the bound reaches minus the log evidence. Planted fault: draws without a gradient stay at the start, 3 nats off."""
    x = torch.tensor([0.9, -0.95])
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(boxed, ["x"])
    loss = dgm.fit(dgm.STL_ELBO(32)(boxed, guide), (x,), max_steps=200, progress=False, seed=0).loss[-20:]
    inside = dist.Normal(x, 0.3).cdf(torch.tensor(1.0)) - dist.Normal(x, 0.3).cdf(torch.tensor(-1.0))
    assert abs(sum(loss) / 20 + float((inside / 2.0).log().sum())) < 0.03


def test_dropout_acts_on_a_budget_of_simulations_and_nowhere_else():
    family = MixtureChain(4, 2)
    assert not family.training and [m.p for m in family.modules() if isinstance(m, torch.nn.Dropout)] == [0.1] * 5
    guide = dgm.AmortizedGuide(boxed, ["x"], family=lambda d, c: MixtureChain(d, c, dropout=0.5))
    batch = dict(dgm.simulate(boxed, 50, observed=("x",), seed=0, progress=False))
    objective = dgm.ForwardKL(guide)
    with torch.no_grad():
        assert float(objective(batch)) == float(objective(batch))
    assert float(objective(batch).detach()) != float(objective(batch).detach())
    assert not guide.groups[0].family.training
    guide.eval()
    assert float(objective(batch).detach()) == float(objective(batch).detach())
    guide.groups[0].family.train()
    assert float(objective(batch).detach()) != float(objective(batch).detach()) and guide.groups[0].family.training


def pooled(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("i", 4):
        return pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_pooled_data_have_one_network_in_front_of_the_mixtures_and_others_a_reader():
    """Both, at the higher rate, leave an sd that does not see how many data there are (test_padded_simulations_train_a_guide)."""
    raw, summary = dgm.AmortizedGuide(boxed, ["x"]), dgm.AmortizedGuide(pooled, ["y"])
    assert raw.groups[0].family.reader is not None and summary.groups[0].family.reader is None
    assert [dgm.ForwardKL(g).recipe(10_000).lr for g in (raw, summary)] == [8e-3, 4e-3]


def test_a_regression_has_a_place_and_a_width_of_its_own():
    """5,000 rows whose sd spans three decades, 5 % of them off by 50 sds: slopes within 5 errors of the weighted least squares.

    Planted fault: equal weights for all rows, whose slopes are 100 times less exact.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5_000, 2, generator=generator, dtype=torch.float64)
    width = torch.exp(1.5 * rows[:, 1] - 4.0)
    noise = torch.randn(5_000, generator=generator, dtype=torch.float64)
    noise[::20] *= 50.0
    x = (0.7 * rows[:, 0] - 0.2 * rows[:, 1] + 0.1 + width * noise)[:, None]
    slope, offset, log_slope, log_offset, gain = place_and_width(rows, x)
    error = float(width.pow(-2.0).sum().rsqrt())
    assert (
        float((slope[0] - torch.tensor([0.7, -0.2])).abs().max()) < 5 * error and abs(float(offset) - 0.1) < 5 * error
    )
    assert (
        abs(float(log_slope[0, 1]) - 1.5) < 0.05
        and abs(float(log_slope[0, 0])) < 0.05
        and abs(float(log_offset) + 3.83) < 0.1
    )
    assert float(place_and_width(rows[:, :1], x)[-1]) < float(gain) - 0.5
