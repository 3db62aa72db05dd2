"""Learned log ratios against known ones, their calibration, and likelihoods learned from a simulator inside other models."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyro_dgm as dgm
from pyro_dgm.ratio.ratio import calibration, learn_ratio, logistic_loss


def normal(loc, scale=1.0, d=2):
    return dist.Normal(loc * torch.ones(d), scale).to_event(1)


def test_a_learned_ratio_is_the_known_one():
    """T against log N(x; .7) - log N(x; 0) on draws of both. Swapped labels give correlation -1 and error 1.4; no training
    gives error 0.7."""
    p, r = normal(0.7), normal(0.0)
    ratio, check = learn_ratio(p.sample((8000,)), lambda n: r.sample((n,)), max_steps=600)
    x = torch.cat([p.sample((2000,)), r.sample((2000,))])
    exact, learned = p.log_prob(x) - r.log_prob(x), ratio(x).detach()
    assert (learned - exact).square().mean().sqrt() < 0.15
    assert torch.corrcoef(torch.stack([learned, exact]))[0, 1] > 0.97
    assert abs(check.mean - 1.0) < 5 * check.error + 0.02 and check.fault == ""


def test_calibration_counts_and_names_its_faults():
    """exp(T) of (1, 1, 2, 4): mean 2, ESS 64 / 22. A logit that is 0.5 too high, one heavy weight, infinity: all told."""
    found = calibration(torch.tensor([1.0, 1.0, 2.0, 4.0]).log())
    assert found.mean == pytest.approx(2.0) and found.ess == pytest.approx(64 / 22) and found.draws == 4
    assert found.error == pytest.approx(math.sqrt(2.0) / 2)
    right = normal(0.3).log_prob(x := normal(0.0).sample((20_000,))) - normal(0.0).log_prob(x)
    assert calibration(right).fault == ""
    assert "must be 1" in calibration(right + 0.5).fault
    assert "carry all weight" in calibration(torch.cat([torch.full((9999,), -9.0), torch.tensor([9.2])])).fault
    assert "overflows" in calibration(torch.tensor([0.0, 1e6])).fault


def test_calibrate_undoes_a_wrong_slope_and_offset():
    """A network whose logit is 3 T + 2 is brought back to T by held-out draws."""
    p, r = normal(0.7), normal(0.0)
    x, y = p.sample((40_000,)), r.sample((40_000,))
    ratio = dgm.DensityRatio(2, network=Exact(p, r, 3.0, 2.0))
    ratio.calibrate(ratio(x), ratio(y))
    slope, offset = ratio.calibrated.tolist()
    assert abs(3 * slope - 1.0) < 0.05 and abs(2 * slope + offset) < 0.05
    check = ratio.check(r.sample((20_000,)))
    assert abs(check.mean - 1.0) < 5 * check.error + 0.03


class Exact(torch.nn.Module):
    def __init__(self, p, r, slope, offset):
        super().__init__()
        self.p, self.r, self.slope, self.offset = p, r, slope, offset

    def forward(self, x):
        return self.slope * (self.p.log_prob(x) - self.r.log_prob(x)) + self.offset


def test_logistic_loss_is_two_log_two_where_nothing_is_known():
    assert logistic_loss(torch.zeros(5), torch.zeros(7)).item() == pytest.approx(2 * math.log(2))


NOISE = 0.6


@pytest.fixture(scope="module")
def simulator():
    """A generator as simulator: x = 0.8 theta + 0.5 z + NOISE eps, so x given theta is normal with sd 0.781."""
    network = torch.nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.5, 0.8]])), network.bias.zero_()
    torch.manual_seed(0)
    generator = dgm.Generator(1, network, base=1, context_features=1, noise=NOISE)
    theta = 1.5 * torch.randn(6000, 1)
    return theta, generator(theta).sample().detach()


SD = math.hypot(0.5, NOISE)


@pytest.fixture(scope="module")
def learned(simulator):
    """The likelihood ratio of the simulator, by logistic regression."""
    theta, x = simulator
    ratio = dgm.DensityRatio(1, context_features=1)
    dgm.fit(dgm.LogisticRegression(ratio), (x, theta), batch_size=512, max_steps=500, progress=False, seed=0)
    return ratio.requires_grad_(False)


def test_a_simulators_likelihood_ratio_is_the_known_one(simulator, learned):
    """log p(x | theta) - log p(x), with rms error below 0.12; pairs of other rows as data (no dependence) give 0.6."""
    theta, x = simulator
    marginal = math.hypot(SD, 1.2)
    exact = (dist.Normal(0.8 * theta, SD).log_prob(x) - dist.Normal(0.0, marginal).log_prob(x))[:, 0]
    assert (learned(x, theta) - exact).square().mean().sqrt() < 0.12
    check = learned.check(x, theta.roll(1, 0))
    assert check.fault == "" and abs(check.mean - 1.0) < 5 * check.error + 0.03


def by_ratio(ratio, data):
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        logits = ratio(data, theta[..., None, None])
        pyro.factor("x", logits.sum(-1))

    return model


def moments_of(data):
    """The exact posterior of theta ~ N(0, 1)."""
    precision = 1.0 + len(data) * 0.64 / SD**2
    return float(0.8 * data.sum() / SD**2 / precision), precision**-0.5


def test_a_ratio_enters_as_a_factor_under_nuts_and_svi(learned):
    """Exact normal posterior. A likelihood that counted one datum twice would be 0.3 sd off in sd."""
    data = torch.tensor([[0.9], [0.1], [1.4]])
    mean, sd = moments_of(data)
    chain = MCMC(NUTS(by_ratio(learned, data)), num_samples=400, warmup_steps=150, disable_progbar=True)
    chain.run()
    theta = chain.get_samples()["theta"]
    assert abs(theta.mean() - mean) < 0.3 * sd and abs(theta.std() / sd - 1.0) < 0.2
    guide = dgm.AutoFlow(model := by_ratio(learned, data))
    dgm.fit(dgm.STL_ELBO()(model, guide), max_steps=150, progress=False, seed=0)
    theta = guide.draws(10_000)["theta"]
    assert abs(theta.mean() - mean) < 0.15 * sd and abs(theta.std() / sd - 1.0) < 0.12


def test_a_learned_likelihood_carries_a_hierarchy(simulator):
    """One conditional flow as each datum's likelihood in a plate of groups; the same model with the exact likelihood beside."""
    theta, x = simulator
    flow = dgm.MAF(1, context_features=1, transforms=1, hidden_features=(32,))
    dgm.fit(dgm.MaximumLikelihood(flow), (x, theta), batch_size=512, max_steps=400, progress=False, seed=0)
    flow.requires_grad_(False)
    data = torch.tensor([1.5, 0.2, -0.4, 2.0, 0.9, 1.1])

    def model(likelihood):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(data)):
            theta = pyro.sample("theta", dist.Normal(mu, 0.7))
            likelihood(theta)

    def exact(theta):
        pyro.sample("x", dist.Normal(0.8 * theta, SD), obs=data)

    def by_flow(theta):
        pyro.sample("x", flow(theta[..., None]), obs=data[:, None])

    draws = {}
    for name, likelihood in {"exact": exact, "learned": by_flow}.items():
        guide = dgm.AutoFlow(model)
        dgm.fit(dgm.STL_ELBO()(model, guide), (likelihood,), max_steps=150, progress=False, seed=0)
        draws[name] = guide.draws(10_000, likelihood)
    for site in ("mu", "theta"):
        a, b = draws["exact"][site], draws["learned"][site]
        assert ((a.mean(0) - b.mean(0)).abs() < 0.15 * a.std(0)).all()
        assert ((b.std(0) / a.std(0) - 1.0).abs() < 0.12).all()
    chain = MCMC(NUTS(model), num_samples=100, warmup_steps=60, disable_progbar=True)
    chain.run(by_flow)
    mu = chain.get_samples()["mu"]
    assert abs(mu.mean() - draws["exact"]["mu"].mean()) < 0.5 * draws["exact"]["mu"].std()


def test_bad_input_says_what_to_do():
    rows = torch.randn(200, 2)
    with pytest.raises(ValueError, match=r"shapes \(200, 2\) and \(200, 3\)"):
        learn_ratio(rows, torch.randn(200, 3))
    with pytest.raises(ValueError, match="1 of 200 draws of p hold NaN"):
        learn_ratio(torch.cat([rows[1:], torch.full((1, 2), torch.nan)]), rows)
    with pytest.raises(ValueError, match="expected one logit a row"):
        dgm.DensityRatio(2, network=torch.nn.Linear(2, 2))(rows)
    with pytest.raises(ValueError, match="no context given, expected shape"):
        dgm.DensityRatio(2, context_features=3)(rows)
    with pytest.raises(ValueError, match="are x and context swapped"):
        dgm.DensityRatio(2, context_features=3)(torch.randn(200, 3), rows)
    with pytest.raises(ValueError, match=r"Build it with DensityRatio\(..., context_features=3\)"):
        dgm.DensityRatio(2)(rows, torch.randn(200, 3))
    with pytest.raises(ValueError, match=r"value has shape \(200, 2\), expected \(\.\.\., 3\)"):
        dgm.DensityRatio(3)(rows)
    with pytest.raises(TypeError, match="expected a DensityRatio, got Linear"):
        dgm.LogisticRegression(torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match="shuffles is 0"):
        dgm.LogisticRegression(dgm.DensityRatio(2), shuffles=0)
    paired = dgm.LogisticRegression(dgm.DensityRatio(2, context_features=1))
    with pytest.raises(ValueError, match="200 events and 100 contexts"):
        paired(rows, rows[:100, :1])
    with pytest.raises(ValueError, match="1 of 200 rows hold NaN"):
        paired(torch.cat([rows[1:], torch.full((1, 2), torch.nan)]), rows[:, :1])
