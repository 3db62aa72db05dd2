"""Plain functions as models."""

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm

PRIOR = {"drift": dist.Normal(0.0, 1.0), "sd": dist.Uniform(0.5, 1.5)}


def walk(drift, sd, rng):
    return np.cumsum(drift + sd * rng.normal(size=6))


def two_sites(drift, sd, rng):
    path = walk(drift, sd, rng)
    return {"end": path[-1], "largest": path.max()}


def outside_of_python(drift, seed):
    """A program of its own, whose answer is read from its output."""
    program = f"import random; random.seed({seed}); print({drift} + random.gauss(0.0, 0.1))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def fails_often(drift, sd, rng):
    if drift < 0.0:
        raise FloatingPointError("below zero")
    return drift


def simulated(model, n=40, **options):
    return dgm.simulate(model, n, observed=list(model.observed), seed=3, progress=False, **options)


def test_simulations_are_made_again_with_the_same_seed_and_without_a_warning(recwarn):
    model = dgm.as_model(walk, PRIOR, observed="path")
    first, second = simulated(model), simulated(model)
    assert torch.equal(first["path"], second["path"]) and first["path"].shape == (40, 6)
    assert float((first["path"][:, -1] / 6 - first["drift"]).abs().mean()) < 0.5
    assert not recwarn.list


def test_processes_give_what_one_gives():
    model = dgm.as_model(walk, PRIOR, observed="path")
    with ProcessPoolExecutor(2) as pool:
        assert torch.equal(simulated(model, executor=pool)["path"], simulated(model)["path"])


def test_several_sites_and_programs_outside_of_python():
    sims = simulated(dgm.as_model(two_sites, PRIOR, observed=["end", "largest"]))
    assert bool((sims["largest"] >= sims["end"]).all())
    sims = simulated(dgm.as_model(outside_of_python, {"drift": dist.Normal(0.0, 1.0)}, observed="y"), n=4)
    assert float((sims["y"] - sims["drift"]).abs().max()) < 0.5


def test_failures_are_counted():
    with pytest.warns(UserWarning, match="failed"):
        sims = simulated(dgm.as_model(fails_often, PRIOR, observed="x"))
    assert bool((sims["drift"] >= 0.0).all()) and len(sims.failed) > 0


def test_a_guide_learns_it():
    """Exact: with steps N(drift, 1) and a standard normal prior the posterior is N(6 / 7 of the mean step, 1 / 7)."""
    pyro.set_rng_seed(0)
    model = dgm.as_model(unit_walk, {"drift": dist.Normal(0.0, 1.0)}, observed="path")
    sims = simulated(model, n=1500)
    guide = dgm.AmortizedGuide(model, observed=["path"])
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=400, progress=False, seed=0)
    draws = guide.condition(path=torch.arange(1.0, 7.0)).sample((4000,))["drift"]
    assert abs(float(draws.mean()) - 6 / 7) < 0.15 and abs(float(draws.std()) - 7**-0.5) < 0.08


def unit_walk(drift, rng):
    return walk(drift, 1.0, rng)


def joint(a, b, rng):
    return a + b + 0.1 * rng.normal(size=5)


def test_parameters_of_a_function_have_one_joint_posterior():
    """Planted (it was so): two flows, since a simulator says nothing of what its data depend on. Exact: correlation -.998."""
    pyro.set_rng_seed(0)
    model = dgm.as_model(joint, {"a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 1.0)})
    guide = dgm.AmortizedGuide(model, observed=["x"])
    assert len(guide.groups) == 1

    def own_noise(x=None):
        total = pyro.sample("a", dist.Normal(0.0, 1.0)) + pyro.sample("b", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Delta(total + 0.1 * torch.randn(())), obs=x)

    assert len(dgm.AmortizedGuide(own_noise, observed=["x"]).groups) == 1
    sims = simulated(model, n=1500)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=500, progress=False, seed=0)
    draws = guide.condition(x=torch.zeros(5)).sample((4000,))
    both = torch.stack([draws["a"], draws["b"]])
    assert float(torch.corrcoef(both)[0, 1]) < -0.95 and float(both.sum(0).std()) < 0.15


def test_what_needs_a_density_is_refused():
    """Planted (it was so): data that are given score nothing, and every posterior is the prior, called good."""
    model = dgm.as_model(unit_walk, {"drift": dist.Normal(0.0, 1.0)}, observed="path")
    path = torch.arange(1.0, 7.0)
    guide = dgm.AmortizedGuide(model, observed=["path"])
    with pytest.warns(UserWarning, match="never trained"):
        posterior = guide.condition(path=path)
    with pytest.raises(ValueError, match="no density"):
        posterior.refine(10)
    with pytest.raises(ValueError, match="density"):
        dgm.AutoFlow(model).setup(path)
    with pytest.raises(ValueError, match="density"):
        dgm.fit(dgm.STL_ELBO()(model, guide), (path,), max_steps=2, progress=False)
    result = dgm.sbc(model, guide, observed=["path"], num_simulations=20, num_draws=50, seed=0, progress=False)
    assert result.sharpness is None or result.sharpness.lost is None


@pytest.mark.parametrize("made", ["words", None, [], {"path": "words"}, 1j])
def test_what_is_no_number_is_named(made):
    model = dgm.as_model(lambda drift: made, {"drift": dist.Normal(0.0, 1.0)}, observed="path")
    with pytest.raises(ValueError, match="as_model: the function gave"):
        model()


@pytest.mark.parametrize(
    "prior, observed, error, text",
    [
        ({}, "x", ValueError, "empty"),
        ({"drift": torch.distributions.Normal(0.0, 1.0)}, "x", TypeError, "pyro.distributions"),
        ({"speed": dist.Normal(0.0, 1.0)}, "x", ValueError, "the function takes"),
        ({"drift": dist.Normal(0.0, 1.0), "rng": dist.Normal(0.0, 1.0)}, "x", ValueError, "no parameter"),
        ({"drift": 1.0, "sd": 1.0}, "x", TypeError, "expected a distribution"),
        ({"drift": dist.Normal(torch.zeros(2), 1.0), "sd": dist.Normal(0.0, 1.0)}, "x", ValueError, r"to_event\(1\)"),
        (PRIOR, "sd", ValueError, "no parameters"),
        (PRIOR, [], ValueError, "expected one name"),
    ],
)
def test_what_is_no_prior_is_refused(prior, observed, error, text):
    with pytest.raises(error, match=text):
        dgm.as_model(walk, prior, observed=observed)


def test_a_function_that_gives_no_mapping_is_refused():
    with pytest.raises(ValueError, match="expected a mapping with the observed names"):
        dgm.as_model(walk, PRIOR, observed=["a", "b"])()


def test_predictions_of_a_function_run_it_anew():
    """Planted: predictions that are copies of the data, which was so; their mean and sd are the prior predictive's."""

    def measured(mu, rng):
        return mu + rng.normal(size=3)

    model = dgm.as_model(measured, prior={"mu": dist.Normal(0.0, 1.0)}, observed="x")
    posterior = dgm.AmortizedGuide(model, ["x"]).condition(x=torch.tensor([5.0, 6.0, 7.0]))
    idata = dgm.from_posterior_samples(posterior.model, {"mu": torch.full((400,), 2.0)}, prior=0)
    x = idata["posterior_predictive"]["x"].values.reshape(-1, 3)
    assert abs(x.mean() - 2.0) < 0.15 and abs(x.std() - 1.0) < 0.1
    assert (idata["observed_data"]["x"].values == [5.0, 6.0, 7.0]).all()


def test_gaps_in_the_data_of_a_function():
    """Many data sets with masks as arrays, which ended in an error: a function has no density that gaps could be taken out of."""
    model = dgm.as_model(lambda mu, rng: mu + rng.normal(size=40), prior={"mu": dist.Normal(0.0, 1.0)}, observed="x")
    sims = dgm.simulate(model, 300, observed=["x"], seed=0, progress=False)
    mask = np.random.default_rng(0).random((300, 40)) < 0.7
    guide = dgm.AmortizedGuide(model, ["x"], encoder="auto", ensemble=1)
    gapped = dgm.Simulations({"mu": sims["mu"], "x": sims["x"]}, ["x"], mask={"x": torch.as_tensor(mask)})
    dgm.fit(dgm.ForwardKL(guide), gapped, max_steps=30, progress=False, seed=0)
    data = {"x": sims["x"][:4].numpy(), "mask": {"x": mask[:4]}}
    found = dgm.workflow(guide, data, num_samples=100, progress=False, seed=0)
    assert set(found.status) <= {"unchecked", "refused"} and bool(found.draws["mu"].isfinite().all())
    with pytest.raises(ValueError, match="status='good', expected one of"):
        found.where("good")
