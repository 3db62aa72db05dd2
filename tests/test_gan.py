"""Generators, critics and adversarial training."""

import math

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import constraints

import pyro_dgm as dgm
from pyro_dgm.core import NoDensityError


class Linear(nn.Module):
    """z -> A z + b with known A and b."""

    def __init__(self, latent=2, features=3):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.register_buffer("a", torch.randn(features, latent, generator=g))
        self.register_buffer("b", torch.randn(features, generator=g))

    def forward(self, z):
        return z @ self.a.T + self.b


def linear_generator(noise=0.5):
    """A generator with the exact law N(mu + s b, s (A A^T + noise^2 I) s); its units are not the identity."""
    generator = dgm.Generator(3, Linear(), base=2, noise=noise)
    generator.standard.loc.copy_(torch.tensor([1.0, -2.0, 0.5]))
    generator.standard.scale.copy_(torch.tensor([2.0, 0.5, 1.0]))
    s, net = generator.standard.scale, generator.network
    covariance = s[:, None] * (net.a @ net.a.T + noise**2 * torch.eye(3)) * s
    return generator, dist.MultivariateNormal(generator.standard.loc + s * net.b, covariance)


# --- Generator -------------------------------------------------------------------------------------------------------


def test_draws_have_the_exact_mean_and_covariance():
    """Within 5 standard errors; a generator without its output noise (planted: noise=0) is 40 errors off."""
    generator, exact = linear_generator()
    x = generator().sample((20_000,))
    white = torch.linalg.solve_triangular(exact.scale_tril, (x - exact.loc).T, upper=False).T
    error = 5 * 20_000**-0.5
    assert white.mean(0).abs().max() < error
    assert (white.T @ white / 20_000 - torch.eye(3)).abs().max() < error * 2**0.5


def test_likelihood_integrates_to_the_exact_evidence():
    generator, exact = linear_generator()
    x = exact.sample((5,))
    log_p = generator.likelihood(torch.randn(100_000, 1, 2)).log_prob(x).double()
    value = log_p.logsumexp(0) - math.log(100_000)
    error = (log_p - value).exp().std(0) / 100_000**0.5
    assert ((value - exact.log_prob(x)).abs() < 5 * error).all()


def test_likelihood_on_a_support_is_the_law_of_the_draws():
    """The mean of the log of positive draws given z, in closed form; noise outside the bijection would be biased."""
    generator = dgm.Generator(2, 8, base=2, noise=0.3, support=constraints.positive)
    z = torch.randn(2)
    x = generator.likelihood(z).sample((4_000,))
    location = generator.location(z)
    assert ((x.log().mean(0) - location).abs() < 5 * 0.3 / 4_000**0.5).all()
    expected = dist.LogNormal(location, 0.3).to_event(1).log_prob(x)
    torch.testing.assert_close(generator.likelihood(z).log_prob(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("event", [(), (2,), (2, 3)])
@pytest.mark.parametrize("context_features", [0, 4])
def test_shapes_follow_sample_batch_and_event(event, context_features):
    generator = dgm.Generator(event, 16, context_features=context_features)
    context = torch.randn(5, 1, 4) if context_features else None
    d = generator(context).expand([7, 5, 3]) if context_features else generator().expand([7, 5, 3])
    x = d.rsample((2,))
    assert x.shape == (2, 7, 5, 3, *event) and d.sample().requires_grad is False
    x.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


def test_rows_of_a_batch_are_independent_draws():
    x = dgm.Generator(2, 8).forward().expand([4]).sample()
    assert (x[0] != x[1]).all()
    conditional = dgm.Generator(2, 8, context_features=1)(torch.zeros(4, 1)).sample()
    assert (conditional[0] != conditional[1]).all()


def test_gradients_reach_the_context():
    context = torch.randn(4, 2, requires_grad=True)
    dgm.Generator(3, 8, context_features=2)(context).rsample().sum().backward()
    assert (context.grad.abs().sum(-1) > 0).all()


def test_log_prob_names_what_works():
    with pytest.raises(NoDensityError, match=r"sample_site.*Adversarial"):
        dgm.Generator(2)().log_prob(torch.zeros(2))

    def model():
        pyro.sample("x", dgm.Generator(2)(), obs=torch.zeros(2))

    with pytest.raises(ValueError, match="site 'x'"):
        infer.Trace_ELBO().loss(model, lambda: None)


def test_state_dict_gives_the_same_draws():
    old, new = dgm.Generator(3, 8), dgm.Generator(3, 8)
    old.standardize(5.0 + 3.0 * torch.randn(50, 3))
    new.load_state_dict(old.state_dict())
    draws = []
    for generator in (old, new):
        torch.manual_seed(0)
        draws.append(generator().sample((4,)))
    assert (draws[0] == draws[1]).all()


def test_images_have_one_scale_and_vectors_one_each():
    x = torch.randn(400, 2, 2) * torch.tensor([[1.0, 10.0], [0.0, 1.0]])
    assert dgm.Generator((2, 2)).standardize(x).standard.scale.unique().numel() == 1
    assert (dgm.Generator(4).standardize(x.flatten(1)).standard.scale > 0).all()
    assert dgm.Generator(4).standardize(x.flatten(1)).standard.scale.unique().numel() == 4


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dgm.Generator(2, noise=-1.0), "noise is -1.0"),
        (lambda: dgm.Generator(2, base=dist.Normal(torch.zeros(2), 1.0)), r"base.to_event\(1\)"),
        (lambda: dgm.Generator(2, noise=0.0).likelihood(torch.zeros(2)), "noise=0"),
        (lambda: dgm.Generator(2, nn.Linear(2, 5), base=2)().sample(), r"returned shape \(5,\).*event_shape \(2,\)"),
        (lambda: dgm.Generator(2, nn.Linear(2, 2), base=2)(torch.zeros(3)), "unconditional"),
        (lambda: dgm.Generator(2, context_features=3)(torch.zeros(2)), "context has 2 features, expected 3"),
        (lambda: dgm.Generator(2).observation(torch.zeros(2), torch.zeros(2), mask=torch.ones(2)), "masks"),
    ],
)
def test_a_generator_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_generator_refuses_the_wrong_kind():
    with pytest.raises(TypeError, match="base is 'normal'"):
        dgm.Generator(2, base="normal")
    with pytest.raises(TypeError, match="network is 'mlp'"):
        dgm.Generator(2, "mlp")


@pytest.mark.parametrize("last, data", [(nn.Tanh(), 255.0), (nn.Sigmoid(), -0.5)])
def test_data_outside_the_networks_range_are_refused(last, data):
    generator = dgm.Generator(1, nn.Sequential(nn.Linear(2, 1), last), base=2)
    with pytest.raises(ValueError, match=f"{type(last).__name__}.*Rescale"):
        generator.standardize(torch.tensor([[0.5], [data]]))
    assert generator.standardize(torch.tensor([[0.5], [0.7]])).standard.is_identity()


# --- a generator in a model ------------------------------------------------------------------------------------------


def test_sample_site_has_latent_noise_and_a_computed_value():
    generator, _ = linear_generator()
    trace = poutine.trace(lambda: generator.sample_site("x")).get_trace()
    z, noise, x = (trace.nodes[k]["value"] for k in ("x_latent", "x_noise", "x"))
    torch.testing.assert_close(x, generator.push(z, noise))
    exact = dist.Normal(0.0, 1.0).log_prob(torch.cat([z, noise])).sum()
    torch.testing.assert_close(trace.log_prob_sum(), exact)


def test_sample_site_in_plates_with_vectorised_particles_and_predictive():
    generator = dgm.Generator(3, 8, base=2, context_features=1)

    def model():
        with pyro.plate("groups", 4, dim=-2), pyro.plate("items", 5, dim=-1):
            x = generator.sample_site("x", torch.zeros(4, 1, 1))
        pyro.sample("y", dist.Normal(x.sum((-1, -2, -3)), 1.0), obs=torch.tensor(0.0))
        return x

    assert model().shape == (4, 5, 3)
    assert infer.Predictive(model, num_samples=6)()["x"].shape == (6, 4, 5, 3)
    run = pyro.plate("particles", 7, dim=-3)(lambda: generator.sample_site("x", torch.zeros(4, 5, 1)))
    assert run().shape == (7, 4, 5, 3)


def observed_model(generator):
    def model(x):
        with pyro.plate("data", len(x)):
            generator.sample_site("x", obs=x)

    return model


def test_an_observed_site_scores_by_the_output_noise():
    """IWAE with 4,000 particles of the prior as a guide against the exact evidence, within 5 errors of the mean weight."""
    generator, exact = linear_generator()
    x = exact.sample((3,))
    model = observed_model(generator)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x_latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    bound = -dgm.IWAE_ELBO(4_000)(model, prior)(x).item()
    log_p = generator.likelihood(torch.randn(4_000, 1, 2)).log_prob(x)
    error = ((log_p.softmax(0).square().sum(0) - 1 / 4_000).sum()).sqrt().item()
    assert abs(bound - exact.log_prob(x).sum().item()) < 5 * error + 0.05


# --- Critic ----------------------------------------------------------------------------------------------------------


def test_a_critic_gives_one_logit_a_row_in_any_batch():
    critic, x = dgm.Critic((2, 3), 16, context_features=2), torch.randn(4, 5, 2, 3)
    logits = critic(x, torch.zeros(5, 2))
    assert logits.shape == (4, 5)
    torch.testing.assert_close(logits[1, 2], critic(x[1, 2], torch.zeros(2)))


def test_spectral_norm_bounds_every_weight():
    """The largest singular value is 1 after a few passes; without spectral_norm (planted) it is not."""
    critic = dgm.Critic(4, nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 1)), spectral_norm=True)
    with torch.no_grad():
        critic.network[0].parametrizations.weight.original.mul_(40.0)
    for _ in range(30):
        critic(torch.zeros(1, 4))
    assert abs(torch.linalg.matrix_norm(critic.network[0].weight, 2).item() - 1.0) < 0.02


def test_a_critic_sees_standardised_rows():
    critic, x = dgm.Critic(2, 8), torch.randn(300, 2)
    plain = critic(x)
    far = 1e4 + 100.0 * x
    torch.testing.assert_close(critic.standardize(far)(far), plain, atol=0.2, rtol=0.1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dgm.Critic(2)(torch.zeros(4, 3)), r"value has shape \(4, 3\)"),
        (lambda: dgm.Critic(2, context_features=3)(torch.zeros(4, 2)), "context has 0 features, expected 3"),
        (lambda: dgm.Critic(2)(torch.zeros(4, 2), torch.zeros(4, 1)), "context has 1 features, expected 0"),
        (lambda: dgm.Critic(2, nn.Linear(2, 2))(torch.zeros(4, 2)), "one logit for each row"),
        (lambda: dgm.Critic(2, nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))), "layer '1' is BatchNorm1d"),
    ],
)
def test_a_critic_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_critic_refuses_the_wrong_kind_of_network():
    with pytest.raises(TypeError, match="network is 2.5"):
        dgm.Critic(2, 2.5)
