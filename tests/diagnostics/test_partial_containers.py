"""Containers of models that cannot give every group: what can be given is there and right, and the rest is warned of once."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyro_dgm as dgm
from pyro_dgm.diagnostics import from_posterior_samples, sample_posterior_predictive
from pyro_dgm.diagnostics.containers import group, has_group

Y = torch.tensor([0.4, 1.3, -0.2, 0.9])
SD = 5**-0.5  # of mu given Y
MEAN = float(Y.sum() / 5)


def posterior(n=2_000):
    return {"mu": MEAN + SD * torch.randn(n)}


def made(model, *args, n=2_000, **options):
    """A container of exact posterior draws, and the warnings that it came with."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        idata = from_posterior_samples(model, posterior(n), *args, seed=0, prior=2_000, **options)
    return idata, [str(w.message) for w in said]


def nuts(model, *args, n=300):
    mcmc = MCMC(NUTS(model), num_samples=n, warmup_steps=100, disable_progbar=True)
    mcmc.run(*args)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return dgm.from_pyro_mcmc(mcmc, *args, seed=0, prior=2_000), [str(w.message) for w in said]


def has_likelihood_of_y(idata, name="y"):
    """Posterior, lp and log-likelihood are there, and are those of four normal data."""
    mu = torch.as_tensor(group(idata, "posterior")["mu"])[..., None]
    wanted = dist.Normal(mu, 1.0).log_prob(Y)
    np.testing.assert_allclose(group(idata, "log_likelihood")[name], wanted, atol=1e-5)
    lp = wanted.sum(-1) + dist.Normal(0.0, 1.0).log_prob(mu[..., 0])
    np.testing.assert_allclose(group(idata, "sample_stats")["lp"], lp, atol=1e-4)


def near(values, mean, sd):
    """Mean and standard deviation, within five of their own errors."""
    values = np.asarray(values).reshape(-1)
    assert abs(values.mean() - mean) < 5 * sd / len(values) ** 0.5
    assert abs(values.std() / sd - 1.0) < 5 / (2 * len(values)) ** 0.5


class NoSampler(dist.Normal):
    def rsample(self, sample_shape=()):
        raise NotImplementedError("this density has no sampler")


class WrongShape(dist.Normal):
    def rsample(self, sample_shape=()):
        return torch.zeros(*self.batch_shape, 7)

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(WrongShape, _instance))


def without_a_plate(y):
    """Nothing but the data gives y its shape."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_data_without_a_plate_are_drawn_in_their_shape():
    """Independent given mu, as their density counts them. Planted fault: one number for all four; y is lost."""
    idata, said = nuts(without_a_plate, Y)
    assert not said
    has_likelihood_of_y(idata)
    new, mu = group(idata, "posterior_predictive")["y"], group(idata, "posterior")["mu"][..., None]
    assert new.shape == (1, 300, 4) and group(idata, "prior_predictive")["y"].shape == (1, 2_000, 4)
    noise = (new - mu)[0]
    near(noise, 0.0, 1.0)
    assert np.abs(np.corrcoef(noise.T)[np.triu_indices(4, 1)]).max() < 5 / 300**0.5
    near(group(idata, "prior_predictive")["y"][..., 0], 0.0, 2**0.5)


@pytest.mark.parametrize("parallel", ["auto", True, False])
@pytest.mark.parametrize("kind, why", [(NoSampler, "NotImplementedError: this density has no sampler"),
                                       (WrongShape, r"has shape \(.*7\)")])  # fmt: skip
def test_a_site_that_cannot_be_drawn_is_left_out_alone(kind, why, parallel):
    """x is there and right in both predictive groups; y is named, once for each of them."""

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            pyro.sample("y", kind(mu, 1.0), obs=y)
        pyro.sample("x", dist.Normal(mu, 1e3), obs=x)

    idata, said = made(model, torch.tensor(0.0), Y, parallel=parallel, n=2_000 if parallel is not False else 200)
    assert len(said) == 2, said
    for name, message in zip(("posterior_predictive", "prior_predictive"), said, strict=True):
        assert f"{name} lacks site 'y'" in message and list(group(idata, name)) == ["x"]
    with pytest.warns(UserWarning, match=why):
        sample_posterior_predictive(idata, model, torch.tensor(0.0), Y, parallel=parallel, extend=False)
    mu = torch.as_tensor(group(idata, "posterior")["mu"])[..., None]
    np.testing.assert_allclose(group(idata, "log_likelihood")["y"], dist.Normal(mu, 1.0).log_prob(Y), atol=1e-5)
    near(group(idata, "posterior_predictive")["x"], MEAN, 1e3)
    near(group(idata, "prior")["mu"], 0.0, 1.0)


def only_with_its_data(y):
    """A run on other data fails, after y."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 4):
        drawn = pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    if drawn is not y:
        raise KeyError("no entry for these data")


def test_a_model_that_runs_on_its_data_only():
    """Predictive groups are missing; the prior is there, since it needs no new data."""
    idata, said = nuts(only_with_its_data, Y)
    has_likelihood_of_y(idata)
    near(group(idata, "prior")["mu"], 0.0, 1.0)
    assert not has_group(idata, "posterior_predictive") and not has_group(idata, "prior_predictive")
    assert [m.split(":")[0] for m in said] == ["The container has no posterior_predictive",
                                               "The container has no prior_predictive"]  # fmt: skip
    assert all(
        "failed after site 'y' (KeyError: 'no entry for these data')" in m and "All other groups" in m for m in said
    )
    with pytest.raises(ValueError, match="the model failed after site 'y'"):
        sample_posterior_predictive(idata, only_with_its_data, Y)


def test_every_way_to_a_container_keeps_what_it_can():
    """Fits, several fits, and NUTS in a guide's coordinates, of the same model."""
    guide = dgm.AutoFlow(only_with_its_data, init_scale=0.5).setup(Y)
    options = {"seed": 0, "num_samples": 40}
    ways = {
        "svi": lambda: dgm.from_svi(only_with_its_data, guide, Y, check=False, prior=20, **options),
        "fits": lambda: dgm.from_fits([guide, guide], only_with_its_data, Y, prior=20, **options),
        "neutra": lambda: dgm.neutra(only_with_its_data, guide, Y, warmup_steps=20, progress=False, **options),
    }
    for name, run in ways.items():
        with pytest.warns(UserWarning, match="The container has no posterior_predictive"):
            idata = run()
        has_likelihood_of_y(idata)
        assert not has_group(idata, "posterior_predictive") and has_group(idata, "prior") == (name != "neutra")


def test_new_data_that_a_plate_of_draws_cannot_hold_are_drawn_one_by_one():
    """Control flow on the data: right with the given ones for all draws at once, and wrong with new ones."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            drawn = pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.deterministic("sign", torch.ones(()) if drawn.reshape(-1, 4).sum(-1) > 0 else -torch.ones(()))

    idata, said = made(model, Y, n=200)
    assert all("cannot run many draws at once" in m for m in said) and said
    has_likelihood_of_y(idata)
    near(group(idata, "posterior_predictive")["y"].mean(-1), MEAN, (SD**2 + 0.25) ** 0.5)
    drawn = group(idata, "prior_predictive")["y"].sum(-1)
    np.testing.assert_array_equal(group(idata, "prior")["sign"], np.where(drawn > 0, 1.0, -1.0))


def test_a_prior_without_a_sampler():
    """An improper prior: its two groups are missing, predictions of the posterior are right."""

    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    idata, said = made(model, Y)
    assert (
        len(said) == 1 and "The container has no prior and no prior_predictive: site 'mu' could not be drawn" in said[0]
    )
    near(group(idata, "posterior_predictive")["y"][..., 0], MEAN, (SD**2 + 1.0) ** 0.5)
    assert not has_group(idata, "prior") and has_group(idata, "log_likelihood")


@pytest.mark.parametrize("parallel", [True, False])
def test_a_prior_whose_draws_cannot_be_factorised(parallel):
    """Half of the prior draws fail; the draws of the posterior do not, whatever the first run draws."""

    def model(y):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        root = torch.linalg.cholesky(s[..., None, None] * torch.eye(4))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(4), scale_tril=root), obs=y)

    draws = {"s": 1.0 + torch.rand(200)}
    for seed in range(4):
        with pytest.warns(UserWarning, match="no prior and no prior_predictive.*could not be factorised.*Add jitter"):
            idata = from_posterior_samples(model, draws, Y, prior=50, parallel=parallel, seed=seed)
        wanted = dist.Normal(0.0, draws["s"][:, None].sqrt()).log_prob(Y).sum(-1)
        np.testing.assert_allclose(group(idata, "log_likelihood")["y"][0], wanted, atol=1e-4)
    whitened = group(idata, "posterior_predictive")["y"] / group(idata, "posterior")["s"][..., None] ** 0.5
    near(whitened, 0.0, 1.0)


def regression(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(mu * x, 1.0), obs=y)


def test_predictions_that_fail_cost_the_predictions_only():
    idata, said = made(regression, torch.ones(4), Y, predictions=((None, None), {}))
    assert len(said) == 1 and "The container has no predictions: TypeError: object of type 'NoneType'" in said[0]
    has_likelihood_of_y(idata)
    near(group(idata, "posterior_predictive")["y"][..., 0], MEAN, (SD**2 + 1.0) ** 0.5)
    assert not has_group(idata, "predictions")


def test_a_posterior_that_is_wrong_stays_an_error():
    """Missing latents and plates that cannot be visited: no container is right."""

    def two(y):
        pyro.sample("tau", dist.Normal(0.0, 1.0))
        without_a_plate(y)

    def subsampled(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4, subsample_size=2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[:2])

    for model, match in ((two, r"latent sites \['tau'\] of the model are not in the draws"),
                         (subsampled, "do not follow its index")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            from_posterior_samples(model, posterior(10), Y)
