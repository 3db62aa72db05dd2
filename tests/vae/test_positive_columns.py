"""Positive columns: log-normal entries among others, their units, and gaps in them."""

import pytest
import torch
from torch.distributions import LogNormal, MultivariateNormal

import pyro_dgm as dgm
from pyro_dgm.vae import log_normal, normal, poisson

MIDDLE = torch.tensor([10.0, -4.0])  # of the logarithms: incomes of 22,000, concentrations of 0.02
LOADINGS, NOISE = torch.tensor([[0.8], [0.6]]), 0.4


def law():
    return MultivariateNormal(MIDDLE, LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(2))


def pair(kinds, encoder):
    d = len(kinds)
    likelihood = dgm.vae.Conditional(d, 1, dgm.vae.columns(kinds), hidden_features=(16,))
    return dgm.VAE(
        dgm.vae.StandardNormal(1), likelihood, dgm.vae.Conditional(1, encoder, normal, hidden_features=(16,))
    )


def test_held_out_density_of_log_normal_data_is_the_exact_one():
    """In the data's units, with the Jacobian: 6 nats a row. Planted faults: density of the logarithms; units of raw data."""
    torch.manual_seed(0)
    x = law().sample((2000,)).exp()
    vae = pair([log_normal, log_normal], 2)
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), (x,), batch_size=128, max_steps=250, lr=1e-2, seed=0, progress=False)
    held_out = law().sample((500,)).exp()
    exact = law().log_prob(held_out.log()) - held_out.log().sum(-1)
    bound = dgm.evaluate.evidence_bound(vae, held_out, 100, seed=0)
    gap = exact - bound.value
    assert float(gap.mean()) < 0.03 and float(gap.mean()) > -5.0 * float(gap.std()) / 500**0.5


def test_the_density_given_a_latent_is_that_of_torch():
    """Planted fault: units of the logarithms without the Jacobian of the exponential."""
    torch.manual_seed(0)
    x = torch.cat([law().sample((200,)).exp(), torch.randn(200, 1)], 1)
    likelihood = dgm.vae.Conditional(3, 1, dgm.vae.columns([log_normal, log_normal, normal]), hidden_features=(8,))
    likelihood.fit_events(x)
    torch.testing.assert_close(likelihood.standard.loc[:2], x[:, :2].log().mean(0), rtol=0.05, atol=0.1)
    entries = likelihood.entries(torch.zeros(1))
    parts = {i: d for d, index in entries.parts for i in index}
    loc, scale = parts[0].loc[0], parts[0].scale[0]
    torch.testing.assert_close(entries.log_prob(x)[:, 0], LogNormal(loc, scale).log_prob(x[:, 0]))


def test_imputed_entries_of_positive_columns_are_positive():
    """And follow what was seen. Planted faults: units that read a gap of 1; a normal in the place of the log-normal."""
    torch.manual_seed(0)
    positive = law().sample((1500,)).exp()
    x = torch.cat([positive, torch.poisson(torch.full((1500, 1), 2.0))], 1)
    mask = torch.rand(x.shape) < 0.7
    gaps = torch.where(mask, x, 1.0)
    vae = pair([log_normal, log_normal, poisson], 6)
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), (gaps, None, mask), batch_size=128, max_steps=250, lr=1e-2, seed=0, progress=False)  # fmt: skip
    torch.testing.assert_close(vae.likelihood.standard.loc[:2], MIDDLE, rtol=0.0, atol=0.1)
    drawn = dgm.vae.impute(vae, gaps, mask, num_samples=20, seed=0)
    assert (drawn[..., :2] > 0).all() and drawn.isfinite().all()
    only = mask[:, 0] & ~mask[:, 1]
    made, seen = drawn[:, only, 1].log().mean(0), x[only, 0].log()
    covariance = law().covariance_matrix
    expected = MIDDLE[1] + covariance[0, 1] / covariance[0, 0] * (seen - MIDDLE[0])
    assert float((made - expected).square().mean().sqrt()) < 0.25  # of 20 draws with sd .47: .11


@pytest.mark.parametrize("call", ["fit", "log_joint"])
def test_a_zero_in_a_positive_column_is_named(call):
    """Planted fault: its logarithm, which is called infinite data."""
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
    vae = pair([log_normal, normal], 2)
    with pytest.raises(
        ValueError, match="Column 0 holds 0, which is not in .*: clean it, or give the column another kind"
    ):
        if call == "fit":
            dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), (x,), max_steps=2, progress=False)
        else:
            vae.log_joint(x, torch.zeros(3, 1))
