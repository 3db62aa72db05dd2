"""What fit takes units from: the data as its parts get them."""

import torch

import pyro_dgm as dgm
from pyro_dgm.objectives import Transformed


def test_units_are_those_of_transformed_data():
    """Planted: units of the data before the transform are those of 0 to 255."""
    levels = torch.randint(0, 256, (500, 2))
    flow = dgm.MAF(2)
    dgm.fit(
        Transformed(dgm.MaximumLikelihood(flow), dgm.Dequantize(256)),
        (levels,),
        batch_size=100,
        max_steps=3,
        progress=False,
    )
    assert (flow.standard.loc - 0.5).abs().max() < 0.05 and (flow.standard.scale - 0.29).abs().max() < 0.03


def test_looking_at_the_data_changes_no_random_number():
    """Planted: without a random state of its own the run for units moves the draws of the fit."""
    x = torch.randn(300, 3)
    losses = []
    for known in (False, True):
        torch.manual_seed(0)
        normal = dgm.vae.normal
        vae = dgm.VAE(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, normal), dgm.vae.Conditional(2, 3, normal))
        if known:
            vae.standardize(x)
        history = dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), x, batch_size=300, max_steps=3, progress=False, seed=0)
        losses.append(torch.tensor(history.loss))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-3)


def test_time_stamps_keep_their_digits_in_training_too():
    """Planted fault: contexts cast to float32 before they are shifted, by which 128 seconds are one."""
    torch.manual_seed(0)
    t = 1.7e9 + 300.0 * torch.rand(4_000, 1, dtype=torch.float64)
    x = ((t - 1.7e9) / 100.0).float() + 0.01 * torch.randn(4_000, 1)
    flow = dgm.RealNVP(1, context_features=1)
    dgm.fit(dgm.MaximumLikelihood(flow), (x, t), batch_size=500, max_steps=300, progress=False, seed=0)
    assert float(flow(t).log_prob(x).mean()) > 1.0  # the truth is 3.2; with 128 seconds to a value -.3
