"""What is wrong with a statement of a model is said of the site, by all that run it; and bars without a number show none."""

import contextlib
import io

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm


def constant(x=None):
    a = pyro.sample("a", 1.0)
    return pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def tensor(x=None):
    a = pyro.sample("a", torch.zeros(3))
    return pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def empty(x=None, n=0):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", n):
        return pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def normal(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


USES = {
    "simulate": lambda model: dgm.simulate(model, 10, observed=["x"], progress=False),
    "AmortizedGuide": lambda model: dgm.AmortizedGuide(model, ["x"]),
    "setup": lambda model: dgm.AutoFlow(model).setup(torch.zeros(1)),
    "fit": lambda model: dgm.fit(
        dgm.STL_ELBO()(model, dgm.AutoFlow(model)), (torch.zeros(1),), max_steps=2, progress=False
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "model, match",
    [
        (constant, r"Site 'a': pyro.sample got 1.0, expected a distribution, .*pyro.deterministic\('a', value\)"),
        (tensor, "Site 'a': pyro.sample got Tensor, expected a distribution"),
        (empty, "Plate 'rows' has size 0, expected one row at least"),
    ],
)
def test_a_statement_that_is_wrong_is_named(use, model, match):
    with pytest.raises((TypeError, ValueError), match=match):
        USES[use](model)


def test_errors_of_a_users_own_code_stay_as_they_are():
    def model(x=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(a / len([]) if x is None else a, 1.0), obs=x) if 1 // 0 else a

    with pytest.raises(ZeroDivisionError, match="integer"):
        dgm.AmortizedGuide(model, ["x"])


def shown(work):
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        work()
    return stream.getvalue()


def test_bars_without_a_number_show_none():
    """Planted: 'prepare: 0step' and 'posteriors: 0it', which stood before the first bar."""
    sims = dgm.simulate(normal, 300, observed=["x"], seed=0, progress=False)
    guide = dgm.AmortizedGuide(normal, ["x"])
    fitted = shown(lambda: dgm.fit(dgm.ForwardKL(guide), sims, max_steps=40))
    checked = shown(lambda: dgm.sbc(None, guide, simulations=sims[:50], num_draws=19))
    assert "0step [" not in fitted and "prepare" in fitted and "40/40" in fitted
    assert "0it [" not in checked and "simulate" not in checked and "posteriors" in checked


def test_a_bar_counts_the_runs_of_a_plain_function():
    def function(theta, rng):
        return theta + rng.normal()

    model = dgm.as_model(function, prior={"theta": dist.Normal(0.0, 1.0)})
    text = shown(lambda: dgm.simulate(model, 150, observed=["x"], seed=0))
    assert "simulate" in text and "/150 [" in text and "150/150" in text
