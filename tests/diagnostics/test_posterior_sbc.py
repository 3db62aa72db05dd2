"""Calibration at the data that were seen: an exact posterior of both data sets passes, a narrow one does not."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.diagnostics import Refit, posterior_sbc

X = torch.tensor([0.2, 0.9, 0.4, -0.3])


def model(n, x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("item", n):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def exact(data, width=1.0):
    precision = 1.0 + len(data["x"])
    return {"mu": data["x"].sum() / precision + width * precision**-0.5 * torch.randn(99)}


def container(width=1.0, bias=0.0, **options):
    guide = lambda n, x=None: pyro.sample("mu", dist.Normal(X.sum() / 5 + bias, width * 5**-0.5))
    return dgm.from_svi(model, guide, 4, X, seed=0, prior=0, **options)


def test_exact_posteriors_keep_the_level():
    """Of 60 at most three are rejected at 1 %. A posterior that leaves the new data out has uniform ranks, too, and is not sharp."""
    idata = container(num_samples=4_000)
    options = {"num_draws": 99, "progress": False}
    rejected = [not posterior_sbc(idata, exact, seed=i, **options).calibrated for i in range(60)]
    assert sum(rejected) <= 3
    blind = lambda data: exact({"x": data["x"][:4]})
    kept, sharp = (posterior_sbc(idata, q, seed=0, num_simulations=300, **options) for q in (blind, exact))
    assert kept.calibrated and abs(kept.sharpness.removed.value) < 0.1 < sharp.sharpness.removed.value


@pytest.mark.parametrize("width, said", [(0.5, "too narrow"), (2.0, "too wide")])
def test_faults_are_seen_and_named(width, said):
    result = posterior_sbc(container(), lambda data: exact(data, width), seed=0, num_draws=99, progress=False)
    assert not result.calibrated and said in str(result)


def test_an_ordinary_guide_is_fitted_to_both_data_sets(tmp_path):
    """A fit to eight rows passes, the same at .4 of its width does not; an AutoFlow runs."""

    def train(width):
        def fit(conditioned, n):
            x = pyro.poutine.trace(conditioned).get_trace(n).nodes["x"]["value"]
            assert n == len(x) == 8
            return lambda n: pyro.sample("mu", dist.Normal(x.sum() / 9, width / 3))

        return fit

    def flow(conditioned, n):
        return dgm.AutoFlow(conditioned, init_scale=1 / 3).setup(n)

    options = {"num_draws": 49, "seed": 0, "progress": False}
    right = posterior_sbc(container(), Refit(model, train(1.0), 8), **options)
    assert right.calibrated and right.pit["mu"].shape == (100,)
    assert not posterior_sbc(container(), Refit(model, train(0.4), 8), **options).calibrated
    few = posterior_sbc(container(), Refit(model, flow, 8), num_simulations=3, **options)
    assert few.pit["mu"].shape == (3,)
    right.picture(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 5_000


def test_draws_that_weights_repair_are_repaired_and_others_refused():
    """Truths that are twice too wide would have ranks of their own, with p = 4e-14."""
    wide = container(width=2.0, num_samples=4_000)
    assert dgm.khat(wide).status == "usable"
    assert posterior_sbc(wide, exact, num_simulations=300, num_draws=99, seed=0, progress=False).calibrated
    with pytest.raises(ValueError, match="are not the posterior's"):
        posterior_sbc(container(width=0.1, bias=3.0), exact, progress=False)


def test_latents_of_the_rows_need_a_model_of_both():
    """New data belong to the same latents: two columns of data, a posterior that reads both, in closed form."""

    def rows(x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    draws = {"z": X / 2 + 0.5**0.5 * torch.randn(400, 4, generator=torch.Generator().manual_seed(5))}
    idata = dgm.from_posterior_samples(rows, draws, X, prior=0, seed=0)
    both = lambda data: {"z": data["x"].sum(0) / 3 + 3**-0.5 * torch.randn(99, 4)}
    with pytest.raises(ValueError, match=r"latents \['z'\] belong to them"):
        posterior_sbc(idata, both, progress=False)
    join = lambda y, new: torch.stack([y, new])
    assert posterior_sbc(idata, both, join=join, num_draws=99, seed=0, progress=False).calibrated


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="has 50 draws"):
        posterior_sbc(container(num_samples=50), exact, progress=False)
    with pytest.raises(ValueError, match="posterior_predictive"):
        posterior_sbc(container(posterior_predictive=False), exact, progress=False)
    alone = lambda x: pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    idata = dgm.from_posterior_samples(alone, {"mu": np.zeros(200)}, torch.tensor(0.0), prior=0)
    with pytest.raises(ValueError, match=r"\['x'\] has no plate"):
        posterior_sbc(idata, exact, num_draws=99, progress=False)
