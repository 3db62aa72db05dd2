"""Networks for series and images, chosen by shape."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.amortized.summaries import summary_for


@pytest.mark.parametrize("shape", [(32,), (500,), (40, 3), (5, 2), (16, 16), (28, 28), (1, 20, 30), (3, 32, 32)])
def test_any_size_becomes_features(shape):
    network = summary_for(torch.Size(shape))
    assert network(torch.randn(7, *shape)).shape == (7, 64)


@pytest.mark.parametrize("shape", [(), (1,), (31,)])
def test_short_vectors_are_read_as_they_are(shape):
    assert summary_for(torch.Size(shape)) is None


def wave(x=None):
    """A sine in noise, whose frequency no linear rule reads from the series."""
    frequency = pyro.sample("frequency", dist.Uniform(1.0, 6.0))
    phase = pyro.sample("phase", dist.Uniform(0.0, 6.28))
    t = torch.linspace(0.0, 3.0, 64)
    mean = torch.sin(frequency[..., None] * t + phase[..., None])
    return pyro.sample("x", dist.Normal(mean, 0.3).to_event(1), obs=x)


def loss_with(encoder):
    pyro.set_rng_seed(0)
    sims = dgm.simulate(wave, 1500, observed=["x"], seed=0, progress=False)
    test = dgm.simulate(wave, 500, observed=["x"], seed=1, progress=False)
    guide = dgm.AmortizedGuide(wave, observed=["x"], encoder=encoder)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=600, progress=False, seed=0)
    with torch.no_grad():
        return float(dgm.ForwardKL(guide)({k: test[k] for k in ("frequency", "phase", "x")}))


def test_a_series_is_read_better_by_its_network():
    """Planted: a network that is not there. 1,500 simulations, nats of held-out loss."""
    with pytest.warns(UserWarning, match="learned by heart"):
        read_as_it_is = loss_with(None)
    assert loss_with("auto") < read_as_it_is - 0.3


def levels(x=None):
    """A constant in noise: what stands in 32 entries is read by their mean."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(level[..., None].expand(*level.shape, 32), 1.0).to_event(1), obs=x)


def short(x=None):
    """Few noisy numbers, of which few simulations are soon known by heart."""
    level = pyro.sample("level", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    return pyro.sample("x", dist.Normal(level.square().repeat_interleave(4, -1), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("model, rows, steps", [(levels, 2500, 300), (short, 300, 800)])
def test_a_network_is_not_asked_for_where_none_is_needed(model, rows, steps):
    """Nothing learned by heart; and 16 entries, which "auto" would read as they are.

    Planted: the warning asks of no gap; and of no network for the shape. Warnings of the package are errors here.
    """
    pyro.set_rng_seed(0)
    sims = dgm.simulate(model, rows, observed=["x"], seed=0, progress=False)
    guide = dgm.AmortizedGuide(model, observed=["x"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = dgm.fit(dgm.ForwardKL(guide), sims, max_steps=steps, progress=False, seed=0)
    assert not [s for s in said if "by heart" in str(s.message)]
    with torch.no_grad():
        own = float(dgm.ForwardKL(guide)({k: v[: rows // 2] for k, v in sims.items()}))
    assert (history.best_loss - own > 0.25) == (model is short)


def test_fresh_simulations_are_not_learned_by_heart():
    """Planted: batches without arguments are read as if they held simulations."""
    held_out = dgm.simulate(levels, 50, observed=["x"], seed=0, progress=False)
    guide = dgm.AmortizedGuide(levels, observed=["x"])
    history = dgm.fit(dgm.ForwardKL(guide), max_steps=3, validation=(held_out,), progress=False, seed=0)
    assert history.steps == 3


@pytest.mark.filterwarnings("ignore:ForwardKL")
def test_what_is_judged_changes_no_later_number():
    """Planted: batches of what was trained on are drawn from the global stream."""
    guide = dgm.AmortizedGuide(levels, observed=["x"])
    sims = dgm.simulate(levels, 300, observed=["x"], seed=0, progress=False)
    states = []
    for judged in (True, False):
        pyro.set_rng_seed(1)
        objective = dgm.ForwardKL(guide) if judged else torch.nn.Sequential(dgm.ForwardKL(guide))
        dgm.fit(objective, sims, max_steps=3, batch_size=30, validation=0.1, lr=1e-9, progress=False)
        states.append(torch.get_rng_state())
    assert states[0].equal(states[1])


@pytest.mark.parametrize("network", [torch.nn.Linear(7, 3), torch.nn.LSTM(64, 3)])
def test_an_encoder_that_does_not_fit_is_named(network):
    with pytest.raises((ValueError, TypeError), match="the encoder of 'x'"):
        dgm.AmortizedGuide(wave, observed=["x"], encoder=network)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="'auto'"):
        dgm.AmortizedGuide(wave, observed=["x"], encoder="cnn")
