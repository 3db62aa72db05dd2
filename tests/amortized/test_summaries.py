"""Networks for series and images, chosen by shape."""

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
    assert loss_with("auto") < loss_with(None) - 0.3


@pytest.mark.parametrize("network", [torch.nn.Linear(7, 3), torch.nn.LSTM(64, 3)])
def test_an_encoder_that_does_not_fit_is_named(network):
    with pytest.raises((ValueError, TypeError), match="the encoder of 'x'"):
        dgm.AmortizedGuide(wave, observed=["x"], encoder=network)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="'auto'"):
        dgm.AmortizedGuide(wave, observed=["x"], encoder="cnn")
