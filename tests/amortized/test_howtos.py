"""The three how-tos with simulators: their code runs, and their densities are those of what they simulate."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_dgm as dgm
from tests.benchmarks.simulators import POSED, Grid, blocks, model_of

PAGES = sorted(POSED)
# Two settings for each, so near to each other that ratios of their densities have a small variance.
SETTINGS = {
    "epidemic": ((0.35, 0.14), (0.345, 0.143)),
    "queue": ((0.2, 0.25), (0.195, 0.26)),
    "pharmacokinetics": ((1.0, 5.0, 40.0), (1.03, 5.1, 39.5)),
}


def expanded(name, setting, n):
    return {k: torch.as_tensor(x).expand(n) for k, x in zip(POSED[name].priors, setting, strict=True)}


def log_likelihood(name, data, values):
    """log p(data | values), nats, of as many data sets, values or both, ``(N,)``."""
    site = POSED[name].observed
    with pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(model_of(name), {**values, site: data})).get_trace()
        return trace.nodes[site]["fn"].log_prob(data)


@pytest.mark.parametrize("name", PAGES)
def test_density_and_simulator_agree(name):
    """E[p(x | b) / p(x | a)] = 1 over x that are simulated with a.

    Planted faults in the simulator alone, each found: counts with twice the variance of their rates, a service 5 % slower, an error
    of .17 in the place of .15.
    """
    n, (a, b) = 20_000, SETTINGS[name]
    torch.manual_seed(0)
    with pyro.validation_enabled(False):
        x = poutine.condition(model_of(name), expanded(name, a, n))()
    here, there = (log_likelihood(name, x.double(), expanded(name, s, n)).double() for s in (a, b))
    ratio = (there - here).exp()
    error = float(ratio.std() / n**0.5)
    assert error < 0.02 and abs(float(ratio.mean()) - 1.0) < 5 * error


@pytest.mark.parametrize("name", PAGES)
def test_grid_has_the_evidence_of_prior_draws(name):
    """The mean likelihood of prior draws is the sum over the grid.

    Planted faults, each found: no Jacobian of the logarithms, cells that are a sixth too large.
    """
    model, posed = model_of(name), POSED[name]
    data = dgm.simulate(model, 1, observed=[posed.observed], seed=3, progress=False)[posed.observed][0]
    grid = Grid(model, posed, data, fine=24)
    torch.manual_seed(0)
    n = {"epidemic": 60_000, "queue": 60_000, "pharmacokinetics": 400_000}[name]
    values = {k: dist.LogNormal(*prior).sample((n,)).double() for k, prior in posed.priors.items()}
    log_p = log_likelihood(name, data.double(), values)
    weights = (log_p - log_p.max()).exp()
    estimate = float(log_p.max()) + math.log(float(weights.mean()))
    error = float(weights.std() / weights.mean()) / n**0.5
    assert error < 0.03 and abs(estimate - grid.log_evidence) < 5 * error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAGES)
def test_the_page_runs(name, monkeypatch, capsys):
    """All of its code, one piece after the other, with few simulations and steps."""
    simulate, fit, sbc = dgm.simulate, dgm.fit, dgm.sbc
    monkeypatch.setattr(
        dgm, "simulate", lambda model, n, **given: simulate(model, min(n, 100), **given, progress=False)
    )
    monkeypatch.setattr(dgm, "fit", lambda *args, **given: fit(*args, **given, max_steps=20, progress=False))
    monkeypatch.setattr(dgm, "sbc", lambda *args, **given: sbc(*args, **given, num_draws=19))
    names = {}
    for code in blocks(name):
        exec(code.replace("5_000", "200"), names)
    assert "sbc" in capsys.readouterr().out and set(names["refined"].draws) == set(POSED[name].priors)


def test_a_distribution_whose_event_shape_is_a_tuple():
    """As a distribution of the user's own may have it; it used to end in an AttributeError."""

    class Pair(dist.TorchDistribution):
        arg_constraints = {}
        support = dist.constraints.real_vector

        def __init__(self, mu):
            self.mu = mu
            super().__init__(mu.shape, (2,), validate_args=False)

        def expand(self, shape, _instance=None):
            return Pair(self.mu.expand(shape))

        def sample(self, shape=()):
            mu = self.mu.expand(torch.Size(shape) + self.mu.shape)
            return mu[..., None] + torch.randn(*mu.shape, 2)

        def log_prob(self, x):
            return dist.Normal(self.mu[..., None], 1.0).log_prob(x).sum(-1)

    def model(x=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        return pyro.sample("x", Pair(mu), obs=x)

    guide = dgm.AmortizedGuide(model, observed=["x"])
    assert guide.structure.observed[0].width == 2
