"""Long work shows bars with named stages, and none where it is told not to."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.core import pace


def model(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(mu.square(), 0.1), obs=x)


def vae():
    net = dgm.vae.Conditional
    return dgm.VAE(dgm.vae.StandardNormal(1), net(3, 1, dgm.vae.normal), net(1, 3, dgm.vae.normal))


def posterior():
    guide = dgm.AmortizedGuide(model, observed=["x"])
    dgm.fit(dgm.ForwardKL(guide), max_steps=2, progress=False, seed=0)
    return guide


def pairs(n):
    return torch.randn(n, 2)


def refined(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return posterior().condition(x=torch.tensor(4.0)).refine(40, seed=0, steps=30, **options)


LONG = {
    "refine": (refined, {"weights": 8, "chains": 30}),
    "workflow": (
        lambda **k: dgm.workflow(posterior(), {"x": torch.tensor([1.0, 4.0])}, num_samples=10, seed=0, **k),
        {"posteriors": 2, "chains 1/20 at most": 100},
    ),
    "evidence_bound": (
        lambda **k: dgm.evaluate.evidence_bound(vae(), torch.zeros(6, 3), 25, chunk=50, **k),
        {"draws": 3, "Pareto fits": 6},
    ),
    "ais": (
        lambda **k: dgm.evaluate.ais(vae(), torch.zeros(2, 3), num_steps=5, latents=torch.zeros(2, 1), **k),
        {"step sizes": 5, "chains": 5, "chains backwards": 5},
    ),
    "conditionals": (
        lambda **k: dgm.diagnostics.conditionals(pairs, pairs(100), [0], max_steps=2, num_draws=19, **k),
        {"posteriors": 19},
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_long_work_shows_its_stages_on_a_bar_that_arrives(name, monkeypatch):
    """Planted: a stage has no steps, and the bar stands still; one is on no bar; ``progress`` is off unless asked for."""
    work, stages = LONG[name]
    seen = {}

    class Bar(pace.tqdm):
        def update(self, n=1):
            super().update(n)
            seen[self.desc] = (max(self.n, seen.get(self.desc, (0,))[0]), self.total)

    monkeypatch.setattr(pace, "tqdm", Bar)
    torch.manual_seed(0)
    work()
    assert {k: seen.get(k) for k in stages} == {k: (n, n) for k, n in stages.items()}, seen


@pytest.mark.parametrize("name", LONG)
def test_progress_false_shows_nothing(name, capsys):
    """Planted: the bar is made in spite of it."""
    LONG[name][0](progress=False)
    assert capsys.readouterr().err == ""


def test_work_on_a_bar_goes_on_where_it_was():
    """Planted: the count begins anew after work in between."""
    with pace.on_bar("all", False) as bar:
        pace.show(bar, "part", 3)
        pace.show(bar, "all", 10, done=4)
        assert (bar.n, bar.initial, bar.total) == (4, 4, 10)
