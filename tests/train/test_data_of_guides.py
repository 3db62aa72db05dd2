"""An automatic guide holds the latents of one data set: what a fit and a container ask of the data."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_dgm as dgm

ERROR = torch.full((80,), 0.5)
SCORE = torch.linspace(-2.0, 2.0, 80)


def groups(error, score=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("group", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("score", dist.Normal(theta, error), obs=score)


def mean(x=None, weight=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with poutine.scale(scale=1.0 if weight is None else weight), pyro.plate("row", 80 if x is None else len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def fitted(model, data, guide=dgm.AutoFlow, **options):
    q = guide(model)
    dgm.fit(dgm.STL_ELBO()(model, q), data, max_steps=3, progress=False, seed=0, **options)
    return q


@pytest.mark.parametrize("guide", [dgm.AutoFlow, AutoNormal])
@pytest.mark.parametrize(("model", "data"), [(groups, (ERROR, SCORE)), (mean, (SCORE,))])
def test_minibatches_that_the_model_counts_once_are_refused(guide, model, data):
    """Before, 80 groups shared 20 latents, and a mean had the posterior of 20 rows, in silence."""
    with pytest.raises(ValueError, match="minibatches of 20 rows, which the model counts once"):
        fitted(model, data, guide, batch_size=20)


def test_a_loader_is_minibatches_too():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(SCORE), batch_size=20)
    with pytest.raises(ValueError, match="minibatches of 20 rows"):
        fitted(mean, loader)


def test_minibatches_that_are_scaled_are_taken():
    """By a scale that the model states, or by a plate of which a step sees a part."""

    def scaled(x):
        mean(x, 4.0)

    def part(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("row", 80, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    assert fitted(scaled, (SCORE,), batch_size=20) and fitted(part, (SCORE,), batch_size=20)


def test_all_rows_in_one_batch_are_no_minibatch():
    assert fitted(mean, (SCORE,), batch_size=80)


@pytest.mark.parametrize(("model", "data", "name"), [(groups, (ERROR,), "score"), (mean, (), "x")])
def test_data_that_were_forgotten_are_told(model, data, name):
    """The prior is no posterior. A density without data and without such an argument is left in peace."""
    with pytest.warns(UserWarning, match=f"its argument '{name}' was not given, so the guide learns the prior"):
        fitted(model, data)


def test_a_density_without_data_says_nothing(recwarn):
    fitted(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)), ())
    assert not [w for w in recwarn if "no site of the model is observed" in str(w.message)]


@pytest.mark.parametrize("count", [20, 80])
def test_data_that_a_container_lacks_are_named(count):
    """With plates that are followed (80 groups) and without. Before, the terms of the 80 did not add up."""
    guide = fitted(groups, (ERROR[:count], SCORE[:count]))
    with pytest.raises(ValueError, match=r"latent sites \['score'\] of the model are not in the guide.*data included"):
        dgm.from_svi(groups, guide, ERROR[:count], num_samples=50)


def simulator(rate, rng):
    return rng.poisson(rate, 3)


def test_a_simulator_that_is_no_model_yet_is_told():
    """Before, Python's message of missing arguments, after twenty runs."""
    for call in (lambda: dgm.AmortizedGuide(simulator, ["x"]), lambda: dgm.simulate(simulator, 10, observed=["x"])):
        with pytest.raises(TypeError, match="missing a required argument: 'rate'.*make a model first: dgm.as_model"):
            call()


def test_a_guide_in_the_place_of_the_objective_is_told():
    model = dgm.as_model(simulator, prior={"rate": dist.Gamma(2.0, 1.0)}, observed="x")
    sims = dgm.simulate(model, 20, observed=["x"], seed=0, progress=False)
    with pytest.raises(TypeError, match=r"AmortizedGuide is a guide.*fit\(ForwardKL\(guide\), sims\)"):
        dgm.fit(dgm.AmortizedGuide(model, ["x"]), sims)


def test_kinds_and_words_that_are_no_data_are_told():
    """A class of likelihoods without its arguments; a table with a column of words."""
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"categorical is made with arguments first, as by vae.categorical\(4\)"):
        dgm.vae.columns([dgm.vae.normal, dgm.vae.categorical])
    table = pandas.DataFrame({"a": ["x", "y"], "b": [1.0, 2.0]})
    with pytest.raises(TypeError, match=r"pandas.factorize\(column\)\[0\], of a column of words"):
        dgm.fit(dgm.MaximumLikelihood(dgm.MAF(2)), table)


@pytest.mark.parametrize("given", [((), {"weight": 1.0}), ((SCORE,), {}), ((SCORE, 1.0), {})])
def test_arguments_that_were_given_before_are_no_handlers(given):
    """Planted fault: the last of them in the place of the model (before, an IndexError of none)."""
    positional, named = given
    assert fitted(partial(mean, *positional, **named), (SCORE,)[len(positional) :])


def test_what_is_computed_is_no_data():
    """Planted fault: a value of pyro.deterministic taken for data, which hides that they were forgotten."""

    def model(x=None):
        pyro.deterministic("twice", 2.0 * pyro.sample("mu", dist.Normal(0.0, 1.0)))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.warns(UserWarning, match="its argument 'x' was not given"):
        fitted(model, ())


@pytest.mark.parametrize("part", [lambda m: poutine.block(m, expose=["mu"]), lambda m: poutine.scale(m, scale=4.0)])
def test_a_part_of_a_model_sees_the_data_of_the_whole(part, recwarn):
    """A guide of some sites, or of a handler's model. Planted fault: look at the part alone, which hides its data."""
    guide = AutoNormal(part(mean))
    dgm.fit(dgm.STL_ELBO()(part(mean), guide), (SCORE,), max_steps=3, progress=False, seed=0)
    assert not [w for w in recwarn if "no site of the model is observed" in str(w.message)]
