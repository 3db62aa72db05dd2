"""A guide that puts a latent on a point is refused by the latent's name; guides that place Deltas by their draws are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide as ag
from pyro.infer.autoguide.gaussian import AutoGaussian

import pyro_dgm as dgm

X = torch.tensor([0.4, 1.3, -0.2])


def model(x=X):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("row", 3):
        b = pyro.sample("b", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(b + p[0], sd), obs=x)


def container(guide, of=model, n=20, **options):
    return dgm.from_svi(of, guide, X, num_samples=n, prior=0, check=False, seed=0, container="dict", **options)


def small(x=X):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(mu, 1.0).expand([3]).to_event(1))
    pyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x)


def beside():
    guide = ag.AutoGuideList(model)
    guide.append(ag.AutoDelta(poutine.block(model, expose=["sd"])))
    guide.append(ag.AutoNormal(poutine.block(model, hide=["sd", "x"])))
    return guide


def by_hand(x):
    """b is free, mu is a point, whatever is around it."""
    pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("mu", dist.Delta(torch.tensor(0.3)).mask(True))


def repeats(x):
    """mu moves with b: there is no density of both."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("mu", dist.Delta(b.mean(-1)))


def beyond(x):
    """One draw for four coordinates."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(z))
    pyro.sample("b", dist.Delta(z[..., None] * torch.ones(3), event_dim=1))


def point_of_many(x):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Delta(torch.zeros(3)).to_event(1))


@pytest.mark.parametrize("parallel", ["auto", True, False])
@pytest.mark.parametrize("guide, site", [(by_hand, "mu"), (repeats, "mu"), (beyond, "mu"), (point_of_many, "b")])
def test_points_by_hand(guide, site, parallel):
    """Planted faults: only AutoDelta is refused; only what is constant is."""
    with pytest.raises(
        ValueError, match=f"^from_svi: latent site '{site}' of the guide .* is a Delta without a density"
    ):
        container(guide, small, parallel=parallel)


@pytest.mark.parametrize("n", [1, 20])
def test_points_of_autoguides(n):
    structured = {"mu": "delta", "sd": "normal", "p": "normal", "b": "normal"}
    guides = {
        "sd": beside(),
        "mu": ag.AutoLaplaceApproximation(model),
        "mu'": ag.AutoStructured(model, conditionals=structured, dependencies={}),
    }
    for site, guide in guides.items():
        with pytest.raises(ValueError, match=rf"^from_svi: latent site '{site[:2]}' of the guide \(Auto"):
            container(guide, n=n)
    with pytest.raises(ValueError, match="^from_fits: latent site 'sd' of the guide"):
        dgm.from_fits([ag.AutoNormal(model), beside()], model, X, num_samples=n, prior=0)


GOOD = {
    "AutoNormal": lambda: ag.AutoNormal(model),
    "AutoDiagonalNormal": lambda: ag.AutoDiagonalNormal(model),
    "AutoMultivariateNormal": lambda: ag.AutoMultivariateNormal(model),
    "AutoLowRank": lambda: ag.AutoLowRankMultivariateNormal(model),
    "AutoFlow": lambda: dgm.AutoFlow(model),
    "AutoIAF": lambda: ag.AutoIAFNormal(model),
    "AutoStructured": lambda: ag.AutoStructured(
        model,
        conditionals={"mu": "normal", "sd": "normal", "p": "mvn", "b": "mvn"},
        dependencies={"b": {"mu": "linear"}},
    ),
    "AutoGaussian": lambda: AutoGaussian(model),
}


@pytest.mark.parametrize("name", GOOD)
def test_deltas_that_draws_place_are_fine(name):
    assert "log_weight" in container(GOOD[name]())["groups"]["sample_stats"]


def test_a_laplace_approximation_is_fine_once_it_is_made():
    guide = ag.AutoLaplaceApproximation(small)
    guide(X)
    assert "log_weight" in container(guide.laplace_approximation(X), small)["groups"]["sample_stats"]


def test_discrete_latents_and_deltas_of_the_model_are_fine():
    """A Delta has a density towards counting; the model's own is the same on both sides."""

    def model(x):
        at = pyro.sample("at", dist.Delta(torch.tensor(0.2)))
        k = pyro.sample("k", dist.Poisson(2.0))
        mu = pyro.sample("mu", dist.Normal(at, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("x", dist.Normal(mu + k, 1.0), obs=x)

    def guide(x):
        pyro.sample("at", dist.Delta(torch.tensor(0.2)))
        pyro.sample("k", dist.Delta(torch.tensor(1.0)))
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    assert "log_weight" in container(guide, model)["groups"]["sample_stats"]


def test_a_posterior_that_is_narrower_than_rounding_is_no_point_estimate():
    """Data that the model meets without noise. Planted fault: the words for a Delta."""
    guide = ag.AutoNormal(
        small, init_loc_fn=ag.initialization.init_to_value(values={"mu": torch.tensor(1.0)}), init_scale=1e-12
    )
    with pytest.raises(ValueError, match="'mu' of the guide .* has one number in all draws: its posterior is narrower"):
        container(guide, small)
