"""A posterior as the prior of the next analysis: against conjugate answers, and as one distribution of mixed kinds."""

import functools
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, config_enumerate
from torch.distributions import constraints

import pyro_dgm as dgm
from pyro_dgm.guides import LearnedPrior, as_prior

GAUSSIAN = functools.partial(dgm.RealNVP, transforms=1)  # in one dimension a normal law, given what it reads
QUICK = {"max_steps": 200, "seed": 0}


def normal_posterior(x, loc=0.0, sd=3.0, power=1.0):
    """Of the mean of N(mu, 1) data, by conjugacy."""
    precision = sd**-2 + power * len(x)
    return (loc * sd**-2 + power * float(x.sum())) / precision, precision**-0.5


def halves():
    torch.manual_seed(0)
    x = 1.5 + torch.randn(60)
    return x[:30], x[30:]


def on_grid(log_density, loc, sd):
    """Mean and sd by quadrature."""
    grid = torch.linspace(loc - 8 * sd, loc + 8 * sd, 4001)
    weight = torch.softmax(log_density(grid[:, None]), 0)
    mean = (weight * grid).sum()
    return float(mean), float((weight * (grid - mean).square()).sum().sqrt())


@pytest.mark.parametrize("family", [dgm.NSF, GAUSSIAN])
def test_half_after_half_is_the_posterior_of_all(family):
    """Within .05 sd, by quadrature over the learned density. Planted: the second half alone is 1.7 sd away and 1.4 times as wide."""
    first, second = halves()
    loc, sd = normal_posterior(first)
    prior = as_prior(
        {"mu": loc + sd * torch.randn(4000)}, {"mu": constraints.real}, family=family, max_steps=600, seed=0
    )

    def joint(mu):
        with torch.no_grad():
            return prior().log_prob(mu) + dist.Normal(mu, 1.0).log_prob(second).sum(-1)

    exact_loc, exact_sd = normal_posterior(torch.cat([first, second]))
    mean, width = on_grid(joint, exact_loc, exact_sd)
    assert abs(mean - exact_loc) < 0.05 * exact_sd and abs(width / exact_sd - 1.0) < 0.05


def test_the_whole_way_by_a_flow_and_by_nuts():
    """Mean and sd of both data sets, from a guide and from a chain over the named site."""
    first, second = halves()
    loc, sd = normal_posterior(first)
    prior = as_prior({"mu": loc + sd * torch.randn(4000)}, {"mu": constraints.real}, family=GAUSSIAN, **QUICK)

    def model(x):
        mu = prior.sample_sites()["mu"]
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    exact_loc, exact_sd = normal_posterior(torch.cat([first, second]))
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), (second,), max_steps=200, progress=False, seed=0)
    with torch.no_grad():
        draws = torch.stack([guide(second)["mu"] for _ in range(1000)])
    assert abs(float(draws.mean()) - exact_loc) < 0.2 * exact_sd and abs(float(draws.std()) / exact_sd - 1.0) < 0.12
    assert not any("flow" in name for name in pyro.get_param_store())  # frozen: no parameter of the model
    mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(second)
    assert abs(float(mcmc.get_samples()["mu"].mean()) - exact_loc) < 0.3 * exact_sd


def test_power_counts_the_old_data_in_part():
    """A normal to the power 1/4 is twice as wide; by quadrature of the model's own density. Planted: the power left out."""
    prior = as_prior({"mu": 2.0 + 0.5 * torch.randn(4000)}, {"mu": constraints.real}, family=GAUSSIAN, **QUICK)

    def joint(mu):
        def one(row):
            traced = pyro.poutine.trace(pyro.poutine.condition(prior.sample_sites, {"mu": row})).get_trace(0.25)
            return traced.log_prob_sum()

        with torch.no_grad():
            return torch.stack([one(row[0]) for row in mu[::10]]).repeat_interleave(10)[: len(mu)]

    mean, width = on_grid(joint, 2.0, 1.0)
    assert abs(mean - 2.0) < 0.05 and abs(width - 1.0) < 0.05
    for bad in (0.0, -1.0, float("nan"), True, "half"):
        with pytest.raises(ValueError, match="power=.*, expected a finite number > 0"):
            prior.sample_sites(power=bad)


def mixed(n=4000):
    """Two discrete sites that depend on each other, and two continuous that depend on them and on each other."""
    torch.manual_seed(0)
    k = dist.Categorical(torch.tensor([0.5, 0.2, 0.3])).sample((n,))
    flag = dist.Bernoulli(torch.tensor([0.1, 0.5, 0.9])[k]).sample().long()
    mu = 2.0 * k - 1.0 + flag + 0.5 * torch.randn(n)
    tau = (0.3 * mu[:, None] + 0.2 * torch.randn(n, 2)).exp()
    return {"tau": tau, "mu": mu, "k": k, "flag": flag}


SUPPORTS = {"mu": constraints.real, "tau": constraints.positive}


@pytest.fixture(scope="module")
def prior():
    return as_prior(mixed(), SUPPORTS, family=functools.partial(dgm.RealNVP, transforms=2), max_steps=600, seed=0)


def test_one_distribution_of_continuous_and_discrete_sites(prior):
    """Its density is that of the draws' law, its draws have the tables and regressions of the draws, and it says its support."""
    q = prior()
    assert prior.names == ["k", "flag", "tau", "mu"] and q.event_shape == (5,) and not q.has_rsample
    assert q.support.is_discrete and "positive" in repr(q.support).lower() or "GreaterThan" in repr(q.support)
    x, data = q.sample((6000,)), mixed(6000)
    k, flag = x[:, 0].long(), x[:, 1].long()
    assert abs(float((k == 0).double().mean()) - 0.5) < 0.03
    for value, share in enumerate((0.1, 0.5, 0.9)):
        assert abs(float(flag[k == value].double().mean()) - share) < 0.06
        assert abs(float(x[k == value, 4].mean() - data["mu"][data["k"] == value].mean())) < 0.2
    assert bool((x[:, 2:4] > 0).all())
    slope = float(torch.cov(torch.stack([x[:, 2].log(), x[:, 4]]))[0, 1] / x[:, 4].var())
    assert abs(slope - 0.3) < 0.05
    assert q.log_prob(x[:7].reshape(7, 1, 5).expand(7, 3, 5)).shape == (7, 3)
    with pytest.raises(ValueError, match="1 of 1 values lie outside the support"):
        q.log_prob(torch.tensor([0.5, 0.0, 1.0, 1.0, 0.0]))


def test_the_sites_in_a_model_have_the_joint_density(prior):
    """Planted: a site given later ones, or the wrong row of the table."""
    traced = pyro.poutine.trace(prior.sample_sites).get_trace()
    values = {n: traced.nodes[n]["value"] for n in prior.names}
    vector = torch.cat([values[n].reshape(-1).float() for n in prior.names])
    torch.testing.assert_close(traced.log_prob_sum(), prior().log_prob(vector))
    assert traced.stochastic_nodes == ["k", "flag", "tau", "mu"]


def test_discrete_sites_are_enumerated(prior):
    """The log density with k and flag summed out equals the sum over their six values."""
    given = {"tau": torch.tensor([0.8, 1.1]), "mu": torch.tensor(0.3)}
    model = pyro.poutine.condition(config_enumerate(lambda: prior.sample_sites()), given)
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)
    summed = -elbo.loss(model, lambda: None)
    rows = torch.tensor([[k, flag, 0.8, 1.1, 0.3] for k in range(3) for flag in range(2)])
    assert abs(summed - float(prior().log_prob(rows).logsumexp(0))) < 1e-4


def test_frozen_until_it_is_not(prior):
    """Fine-tuning trains the flows with the model; saved states load into a prior of the same sites."""
    assert not any(p.requires_grad for p in prior.parameters())
    again = LearnedPrior(prior.shapes, prior._on, functools.partial(dgm.RealNVP, transforms=2))
    again.load_state_dict(prior.state_dict())
    x = prior().sample((4,))
    torch.testing.assert_close(again().log_prob(x), prior().log_prob(x))
    again.requires_grad_(True)
    with pyro.poutine.trace(param_only=True) as tr:
        again.sample_sites()
    assert len(tr.trace.param_nodes) == len(list(again.parameters()))


def test_a_container_gives_its_draws():
    group = {"mu": types.SimpleNamespace(values=np.random.default_rng(0).normal(size=(2, 100, 3)))}
    prior = as_prior(types.SimpleNamespace(posterior=group), family=GAUSSIAN, max_steps=5, seed=0)
    assert prior.shapes == {"mu": (3,)}


N = 200
BAD = [
    ({"mu": torch.randn(50)}, None, "numbers of draws are {'mu': 50}"),
    ({"mu": torch.randn(N), "k": torch.randn(N - 1)}, None, "expected the same for all sites"),
    ({"mu": torch.full((N,), torch.nan)}, None, "site 'mu': 200 of 200 rows hold NaN"),
    ({"mu": torch.randn(N)}, {"mu": constraints.positive}, "draws of 'mu' lie outside of"),
    ({"k": torch.randint(3, (N, 2))}, None, "discrete site 'k' has shape"),
    ({"k": torch.randint(3, (N,))}, {"k": constraints.nonnegative_integer}, "expected integers from 0"),
    ({"a": torch.arange(N), "b": torch.arange(N)}, None, "40,000 combinations"),
    ({}, None, "expected {site"),
    (None, None, "draws are NoneType"),
]


@pytest.mark.parametrize(("draws", "supports", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_draws_are_refused(draws, supports, message):
    with pytest.raises(ValueError, match=message):
        as_prior(draws, supports, family=GAUSSIAN)


def test_a_positive_site_on_the_reals_is_told():
    with pytest.warns(UserWarning, match="all draws of 'sigma' are positive"):
        as_prior({"sigma": torch.rand(N)}, family=GAUSSIAN, max_steps=5, seed=0)
    with pytest.raises(TypeError, match="supports is .*'positive'.*, expected a mapping"):
        as_prior({"sigma": torch.rand(N)}, {"sigma": "positive"})
