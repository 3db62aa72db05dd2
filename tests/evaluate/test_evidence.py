"""Bounds of the evidence against exact ones, and the terms that are added to a bound."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_dgm as dgm
from pyro_dgm import vae as parts
from pyro_dgm.core import MLP
from pyro_dgm.evaluate import ais, evidence_bound
from pyro_dgm.objectives import WeightedKL_ELBO
from pyro_dgm.vae import LatentMMD, Penalised, TotalCorrelation
from tests.vae.test_vae import LATENT, D, evidence, ppca, small


def with_poor_encoder():
    """A linear VAE, data of its own, their latents, and an encoder that knows nothing."""
    vae, _ = ppca(1)
    z = vae.prior().expand([12]).sample()
    x = vae.decode(z).sample()
    with torch.no_grad():
        vae.posterior.network.weight.zero_()
        vae.posterior.network.bias.copy_(torch.tensor([1.5, -1.5, -0.7, 0.0, -0.7]))
    return vae, x, z


def test_the_bound_has_the_error_that_it_says():
    """Estimates with a good encoder lie around the evidence, by their own errors. Planted fault: error without the root of S."""
    vae, x = ppca(40)
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), x, lr=3e-2, max_steps=60, progress=False, seed=0)
    bound = evidence_bound(vae, x, 1000, seed=1)
    score = (bound.value - evidence(vae, x)) / bound.standard_error
    assert 0.4 < score.square().mean().sqrt() < 1.7 and (bound.pareto_k < 0.7).double().mean() > 0.8
    again = evidence_bound(vae, x, 1000, chunk=7_000, seed=1)
    assert ((again.value - bound.value).abs() < 6 * bound.standard_error).all()
    mean, error = bound.mean()
    assert mean == pytest.approx(float(bound.value.mean())) and error == pytest.approx(
        float(bound.value.std()) / 40**0.5
    )


def test_annealing_finds_the_evidence_where_the_bound_does_not():
    """The bound of 50 draws is more than 1 nat off and says so by Pareto k; AIS is within 0.1 nat, and so is the upper bound
    of the backward chains."""
    vae, x, z = with_poor_encoder()
    exact = evidence(vae, x).mean().item()
    bound = evidence_bound(vae, x, 50, seed=0)
    assert bound.value.mean() < exact - 1.0 and (bound.pareto_k > 0.7).double().mean() > 0.5
    annealed = ais(vae, x, num_steps=200, num_chains=12, latents=z, seed=0)
    error = annealed.standard_error.square().sum().sqrt() / len(x)
    assert abs(annealed.value.mean() - exact) < 0.1 and abs(annealed.value.mean() - exact) < 4 * error + 0.02
    gap, gap_error = annealed.gap()
    assert abs(gap) < 0.1 + 4 * gap_error and (annealed.upper.mean() - exact).abs() < 0.1 + 4 * gap_error
    assert (annealed.acceptance > 0.4).all()


def test_annealed_weights_are_unbiased_at_any_length():
    """Twelve temperatures and many chains. Planted fault: a temperature's weight taken after its move (nats above)."""
    vae, x, _ = with_poor_encoder()
    annealed = ais(vae, x, num_steps=12, num_chains=1500, leapfrog=3, seed=0)
    score = (annealed.value - evidence(vae, x)) / annealed.standard_error
    assert (score.abs() < 4.5).all() and annealed.standard_error.max() < 0.3


def test_what_annealing_cannot_do_is_said():
    vae, x, z = with_poor_encoder()
    with pytest.raises(ValueError, match="expected at least 2 of each"):
        ais(vae, x, num_steps=1)
    with pytest.raises(ValueError, match="one for each row of x"):
        ais(vae, x, latents=z[:3])
    with pytest.raises(ValueError, match="AIS.gap: it needs the latents behind the data"):
        ais(vae, x, num_steps=2, num_chains=2).gap()
    with pytest.raises(ValueError, match="num_samples=10, expected at least 25"):
        evidence_bound(vae, x, 10)


def gradient(objective, vae, x, seed=5):
    torch.manual_seed(seed)
    loss = objective(x)
    grads = torch.autograd.grad(loss, list(vae.parameters()))
    return loss.item(), torch.cat([g.flatten() for g in grads])


def test_a_weight_of_the_kl_acts_on_the_gradient_and_not_on_the_value():
    """Gradients of beta = 1 and 3 differ by twice the gradient of the closed-form KL; values are equal."""
    vae, x = small(), torch.randn(30, D)
    one, three = (gradient(WeightedKL_ELBO(b)(vae.model, vae.guide), vae, x) for b in (1.0, 3.0))
    q = vae.encode(x)
    kl = torch.distributions.kl_divergence(
        q._base(), dist.Normal(torch.zeros(LATENT), 1.0).expand((30, LATENT)).to_event(1)
    )
    (expected,) = [torch.autograd.grad(kl.sum(), list(vae.posterior.parameters()))]
    expected = torch.cat([g.flatten() for g in expected])
    assert one[0] == three[0]
    torch.testing.assert_close((three[1] - one[1])[-len(expected) :], 2 * expected, atol=1e-3, rtol=1e-3)


def test_a_flow_prior_has_its_kl_estimated():
    """Without a closed form the value is still the ELBO: equal to Trace_ELBO's in expectation."""
    vae, x = small(prior=dgm.MAF(LATENT, transforms=1, hidden_features=(8,))), torch.randn(30, D)
    with torch.no_grad():
        ours, theirs = (
            torch.stack([b(vae.model, vae.guide)(x) for _ in range(60)]) for b in (WeightedKL_ELBO(5.0), Trace_ELBO())
        )
    assert abs(ours.mean() - theirs.mean()) < 5 * ((ours.var() + theirs.var()) / 60).sqrt()


def test_warm_up_rises_and_says_when_it_did_not_end():
    vae, x = small(), torch.randn(30, D)
    objective = WeightedKL_ELBO(2.0, warmup_steps=10)(vae.model, vae.guide)
    weights = []
    for _ in range(12):
        weights.append(objective.weight())
        objective(x)
    assert weights[:3] == [0.0, 0.2, 0.4] and weights[-1] == 2.0
    fresh = WeightedKL_ELBO(warmup_steps=100)(vae.model, vae.guide)
    with pytest.warns(
        UserWarning, match="training ended after 6 of 100 warm-up steps, with a KL weight of 0.06 instead of 1"
    ):
        dgm.fit(fresh, x, max_steps=6, progress=False)
    with pytest.raises(ValueError, match="beta=-1.0, expected a finite number >= 0"):
        WeightedKL_ELBO(-1.0)


def test_free_nats_are_not_pushed():
    """A KL below the free nats has no gradient: the encoder's is that of the likelihood alone (beta = 0)."""
    vae, x = small(), torch.randn(30, D)
    free = gradient(WeightedKL_ELBO(free_nats=100.0)(vae.model, vae.guide), vae, x)
    none = gradient(WeightedKL_ELBO(0.0)(vae.model, vae.guide), vae, x)
    paid = gradient(WeightedKL_ELBO(free_nats=0.0)(vae.model, vae.guide), vae, x)
    torch.testing.assert_close(free[1], none[1])
    assert free[0] == pytest.approx(paid[0], abs=1e-2) and not torch.allclose(free[1], paid[1])


class Direct(nn.Module):
    """An encoder that returns the data as means, with a small scale."""

    def forward(self, x):
        return torch.cat([x, torch.full_like(x, -1.5)], -1)


def copying():
    return dgm.VAE(
        parts.StandardNormal(2),
        parts.Conditional(2, 2, parts.normal, hidden_features=(4,)),
        parts.Conditional(2, 2, parts.normal, network=Direct()),
    )


def test_total_correlation_sees_dependent_latents():
    """Near the exact value for correlated Gaussians (0.66 nats at 0.857), near zero for independent ones."""
    torch.manual_seed(0)
    z = torch.randn(1500, 2)
    correlated = torch.stack([z[:, 0], 0.9 * z[:, 0] + math.sqrt(1 - 0.81) * z[:, 1]], -1)
    term = TotalCorrelation(copying(), size=1500)
    exact = -0.5 * math.log(1 - (0.9 / (1 + math.exp(-3.0))) ** 2)
    assert abs(term(z).item()) < 0.15 and abs(term(correlated).item() - exact) < 0.2
    with pytest.raises(ValueError, match="batch of one row has no aggregated posterior"):
        term(z[:1])
    with pytest.raises(ValueError, match="does not separate into coordinates"):
        full = small(posterior=parts.FullRank(LATENT, D))
        TotalCorrelation(full, 10)(torch.randn(5, D))


def test_mmd_sees_a_latent_law_that_is_not_the_prior():
    torch.manual_seed(0)
    term, z = LatentMMD(copying()), torch.randn(600, 2)
    values = torch.stack([term(z) for _ in range(30)])
    assert abs(values.mean()) < 0.02 < 0.1 < term(0.5 * z + 1.0)
    with pytest.raises(ValueError, match="batch of one row has no spread"):
        term(z[:1])


def test_added_terms_train_and_are_not_reported():
    vae, x = small(), torch.randn(40, D)
    bound = Trace_ELBO()(vae.model, vae.guide)
    plain, added = gradient(bound, vae, x), gradient(Penalised(bound, (100.0, LatentMMD(vae))), vae, x)
    assert plain[0] == added[0] and not torch.allclose(plain[1], added[1])
    torch.manual_seed(0)
    z, mixed = torch.randn(500, 1), MLP(1, D, (16,))
    objective = Penalised(bound, (2000.0, LatentMMD(vae)))
    dgm.fit(objective, mixed(z).detach(), lr=1e-2, max_steps=60, progress=False, seed=0)
    assert LatentMMD(vae)(mixed(z).detach()) < 0.1


def test_a_trajectory_that_diverges_is_rejected_and_bad_data_are_refused():
    """Planted fault: distributions validate what a step that went too far gives them, and annealing ends in their error."""
    net = nn.Linear(2, 3)
    net.weight.data *= 20.0
    count = parts.Conditional(3, 2, parts.poisson, network=net)
    vae = dgm.VAE(parts.StandardNormal(2), count, parts.Conditional(2, 3, parts.normal))
    x = torch.tensor([[200.0, 0.0, 3.0]])
    assert ais(vae, x, num_steps=30, num_chains=8, seed=0).value.isfinite().all()
    for bad in (x - 201.0, x * math.nan):
        with pytest.raises(ValueError):
            ais(vae, bad, num_steps=30, num_chains=8, seed=0)
