"""Influential data, whose leave-one-out posteriors draws are moved to."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_dgm as dgm
from pyro_dgm.core.weights import arviz_major, k_threshold, log_mean, moment_matched
from pyro_dgm.diagnostics.loo import elpd_of

X = torch.stack([torch.ones(20), torch.linspace(-1.0, 1.0, 20)], -1)
X[-1, 1] = 5.0  # a lever
Y = X @ torch.tensor([1.0, -1.0]) + torch.sin(7.0 * torch.arange(20.0))
Y[-1] = 6.0  # ten above the line


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal((x * beta.unsqueeze(-2)).sum(-1), 1.0), obs=y)


def posterior_of(x, y):
    precision = torch.eye(2) / 9.0 + x.T @ x
    return dist.MultivariateNormal(torch.linalg.solve(precision, x.T @ y), precision_matrix=precision)


def exact_elpd():
    """Each datum given the others: normal, with the variance of its line."""
    found = []
    for i in range(len(X)):
        rest = posterior_of(np.delete(X, i, 0), np.delete(Y, i, 0))
        scale = (1.0 + X[i] @ rest.covariance_matrix @ X[i]).sqrt()
        found.append(dist.Normal(X[i] @ rest.mean, scale).log_prob(Y[i]).item())
    return np.array(found)


def exact_guide():
    guide = AutoMultivariateNormal(regression)
    guide(X, Y)
    law = posterior_of(X, Y)
    with torch.no_grad():
        guide.loc.copy_(law.mean)
        scale = law.scale_tril.diagonal()
        guide.scale = scale.clone()
        guide.scale_tril = law.scale_tril / scale[:, None]
    return guide


def by_datum(result):
    named = ("loo_i", "pareto_k") if arviz_major() == 0 else ("elpd_i", "pareto_k")
    return [np.asarray(result[k] if arviz_major() == 0 else getattr(result, k)).ravel() for k in named]


@pytest.mark.parametrize("kind", ["normal", "flow"])
def test_an_outlier_gets_the_elpd_of_a_refit(kind):
    """Closed form. Without the log-determinant of the maps the repaired value is off by nats."""
    guide = exact_guide()
    if kind == "flow":
        torch.manual_seed(0)
        guide = dgm.AutoFlow(regression)
        dgm.fit(dgm.STL_ELBO()(regression, guide), (X, Y), max_steps=100, progress=False)
    idata = dgm.from_svi(regression, guide, X, Y, seed=0, num_samples=1_000)
    with pytest.warns(UserWarning, match="not reliable"):
        before = dgm.loo(idata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = dgm.loo(idata, repair=(regression, guide, (X, Y)))
    (was, k_was), (now, k_now), exact = by_datum(before), by_datum(after), exact_elpd()
    assert k_was[-1] > 0.7 and abs(was[-1] - exact[-1]) > 0.5
    assert (k_now < k_threshold(1_000)).all() and abs(now[-1] - exact[-1]) < 3.0 * after.mcse + 0.01 < 0.5
    assert np.allclose(now[:-1], was[:-1], atol=0.01) and abs(elpd_of(after) - exact.sum()) < 3.0 * after.mcse
    assert not after.warning


def test_what_cannot_be_repaired_is_said():
    guide = exact_guide()
    idata = dgm.from_svi(regression, guide, X, Y, seed=0, num_samples=1_000)
    wrong = {
        r"expected \(model, guide, args\)": (regression, guide, X),
        "no density over one vector": (regression, lambda x, y: None, (X, Y)),
        "19 data of 'y', expected the 20": (regression, guide, (X[1:], Y[1:])),
    }
    for said, repair in wrong.items():
        with pytest.raises(ValueError, match=said):
            dgm.loo(idata, repair=repair)
    with pytest.raises(ValueError, match="taken for the posterior's"):
        dgm.loo(dgm.resample(idata, seed=0), repair=(regression, guide, (X, Y)))


def test_a_guide_that_is_off_itself_repairs_nothing():
    guide = exact_guide()
    with torch.no_grad():
        guide.loc.add_(3.0)
    idata = dgm.from_svi(regression, guide, X, Y, seed=0, num_samples=1_000)
    with pytest.warns(UserWarning, match="far from the posterior"):
        kept = dgm.loo(idata, repair=(regression, guide, (X, Y)))
    with pytest.warns(UserWarning):
        assert elpd_of(kept) == elpd_of(dgm.loo(idata))


def test_moved_draws_keep_the_evidence():
    """A target of another mean, scales and correlation: all three maps are needed, and its log mean weight is one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4_000, 3))
    log_q = -0.5 * (x**2).sum(1)
    target = dist.MultivariateNormal(
        torch.tensor([1.0, -1.0, 0.5]).double(),
        torch.tensor([[0.5, 0.4, 0.0], [0.4, 0.6, 0.2], [0.0, 0.2, 2.5]]).double(),
    )
    log_target = lambda points: target.log_prob(torch.as_tensor(points)).numpy() + 1.5 * np.log(2.0 * np.pi)
    raw, _, k = moment_matched(x, log_q, log_target, -1.0)
    assert k < 0.2 and abs(log_mean(raw)) < 0.02
    unmoved = log_target(x) - log_q
    assert moment_matched(x, log_q, log_target, np.inf)[0] == pytest.approx(unmoved)
