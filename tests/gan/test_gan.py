"""Generators, critics and adversarial training."""

import math
import warnings

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
from pyro_dgm.gan.critic import LOSSES, gradient_norms


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
    """A generator with the exact distribution N(mu + s b, s (A A^T + noise^2 I) s); its units are not the identity."""
    generator = dgm.Generator(3, Linear(), base=2, noise=noise)
    generator.standard.loc.copy_(torch.tensor([1.0, -2.0, 0.5]))
    generator.standard.scale.copy_(torch.tensor([2.0, 0.5, 1.0]))
    s, net = generator.standard.scale, generator.network
    covariance = s[:, None] * (net.a @ net.a.T + noise**2 * torch.eye(3)) * s
    return generator, dist.MultivariateNormal(generator.standard.loc + s * net.b, covariance)


pytestmark = pytest.mark.filterwarnings("ignore:fit. at step")  # most fits here are too short to be good


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


def test_still_pixels_are_not_blown_up_and_vectors_have_a_scale_each():
    """sd 0.1, 10, 0 and 1 have a root mean square of 5: the first and third pixel get a tenth of that."""
    x = torch.randn(400, 2, 2) * torch.tensor([[0.1, 10.0], [0.0, 1.0]])
    scale = dgm.Generator((2, 2)).standardize(x).standard.scale
    least = 0.1 * x.reshape(400, 4).var(0).mean().sqrt()
    assert torch.allclose(scale[[0, 2]], least) and torch.allclose(scale[[1, 3]], x.reshape(400, 4).std(0)[[1, 3]])
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


@pytest.mark.parametrize("observed, wrap", [(False, 0), (True, 0), (True, 1)])
def test_a_flow_guide_refuses_an_implicit_site_before_it_starts(observed, wrap):
    """Without the early check (planted) set-up succeeds and the first step fails."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=torch.tensor(True)):
            fn = dgm.Generator(2, 4, context_features=1)(a.expand(3, 1))
            pyro.sample("x", fn.mask(True) if wrap else fn, obs=torch.zeros(3, 2) if observed else None)

    with pytest.raises(ValueError, match=f"AutoFlow: {'observed' if observed else 'latent'} site 'x'.*sample_site"):
        dgm.AutoFlow(model).setup()


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
        next(p for p in critic.network[0].parameters() if p.dim() == 2).mul_(40.0)
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
        (lambda: dgm.Critic(2, context_features=3)(torch.zeros(4, 2)), "no context given, expected shape"),
        (
            lambda: dgm.Critic(2)(torch.zeros(4, 2), torch.zeros(4, 1)),
            r"Build it with Critic\(..., context_features=1\)",
        ),
        (lambda: dgm.Critic(2, context_features=3)(torch.zeros(4, 3), torch.zeros(4, 2)), "x and context swapped"),
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


# --- losses and penalties --------------------------------------------------------------------------------------------

REAL, FAKE = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
LOG = {t: math.log1p(math.exp(t)) for t in (-2.0, 1.0, 0.5, -3.0, -0.5, 3.0, -1.5, -5.0)}
BY_HAND = {
    "saturating": ((LOG[-2.0] + LOG[1.0] + LOG[0.5] + LOG[-3.0]) / 2, -(LOG[0.5] + LOG[-3.0]) / 2),
    "non-saturating": ((LOG[-2.0] + LOG[1.0] + LOG[0.5] + LOG[-3.0]) / 2, (LOG[-0.5] + LOG[3.0]) / 2),
    "relativistic": ((LOG[-1.5] + math.log1p(math.exp(-2.0))) / 2, (math.log1p(math.exp(1.5)) + math.log1p(math.e**2)) / 2),
    "least-squares": ((1.0 + 4.0 + 0.25 + 9.0) / 4, (0.25 + 16.0) / 4),
    "hinge": ((0.0 + 2.0 + 1.5 + 0.0) / 2, 1.25),
    "wgan-gp": (-1.25 - 0.5, 1.25),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_equal_those_computed_by_hand(name):
    loss = LOSSES[name]
    assert loss.critic(REAL, FAKE).item() == pytest.approx(BY_HAND[name][0], abs=1e-6)
    assert loss.generator(REAL, FAKE).item() == pytest.approx(BY_HAND[name][1], abs=1e-6)


@pytest.mark.parametrize("name", ["saturating", "non-saturating", "relativistic"])
def test_losses_of_extreme_logits_are_finite(name):
    """A logarithm of a sigmoid (planted) is infinite here."""
    far = torch.tensor([300.0, -300.0])
    assert LOSSES[name].critic(far, -far).isfinite() and LOSSES[name].generator(far, -far).isfinite()


class Quadratic(nn.Module):
    """T(x) = |x|^2 / 2, whose gradient is x."""

    def forward(self, x):
        return 0.5 * x.square().sum(-1, keepdim=True)


def test_gradient_norms_are_those_of_single_rows():
    """With T = |x|^2/2 they are |x|^2. The norm of the whole batch's gradient (planted) is their sum, the same for all."""
    x, critic = torch.randn(6, 3), dgm.Critic(3, Quadratic())
    logits, square = gradient_norms(critic, x, None)
    torch.testing.assert_close(square, x.square().sum(-1))
    torch.testing.assert_close(logits, 0.5 * x.square().sum(-1))
    (
        critic.standard.loc.copy_(torch.tensor([1.0, -1.0, 0.0])),
        critic.standard.scale.copy_(torch.tensor([1.0, 2.0, 3.0])),
    )
    logits, square = gradient_norms(critic, x, None)
    torch.testing.assert_close(square, critic.standard(x).square().sum(-1))
    torch.testing.assert_close(logits, critic(x))


@pytest.mark.parametrize("base, context_features", [(2, 0), (2, 1), (dgm.MAF(2, transforms=1), 0)])
def test_direct_draws_have_the_law_of_the_distribution(base, context_features):
    """Means and covariances of both within 5 errors; a draw that leaves out the noise or the units (planted) is far off."""
    generator = dgm.Generator(2, 8, base, context_features, noise=0.5)
    generator.standard.loc.fill_(3.0), generator.standard.scale.fill_(2.0)
    context = torch.ones(20_000, context_features) if context_features else None
    direct = generator.draw(20_000, context)
    assert direct.requires_grad and direct.shape == (20_000, 2)
    other = generator(context).sample() if context_features else generator().sample((20_000,))
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(other.T.cov()), (direct - other.mean(0)).T, upper=False)
    error = 5 * (2 / 20_000) ** 0.5
    assert white.mean(1).abs().max() < error
    assert (white.cov() - torch.eye(2)).abs().max() < 2 * error


def _objective(**options):
    return dgm.Adversarial(dgm.Generator(2, Linear(2, 2), base=2, noise=0.0), dgm.Critic(2, Quadratic()), **options)


def test_r1_and_r2_are_half_the_mean_squared_gradient_at_data_and_draws():
    x, losses = torch.randn(50, 2), {}
    for key, weights in {"none": (0.0, 0.0), "r1": (3.0, 0.0), "r2": (0.0, 5.0)}.items():
        torch.manual_seed(1)
        losses[key] = _objective(r1=weights[0], r2=weights[1]).critic_loss(x)[0].item()
    torch.manual_seed(1)
    draws = _objective().generator().sample((50,))
    assert losses["r1"] - losses["none"] == pytest.approx(1.5 * x.square().sum(-1).mean().item(), rel=1e-5)
    assert losses["r2"] - losses["none"] == pytest.approx(2.5 * draws.square().sum(-1).mean().item(), rel=1e-5)


def test_gradient_penalty_is_one_sided_at_no_row():
    """Mean over rows of (|x| - 1)^2 between data and draws. A norm of the batch's gradient (planted) would be sqrt(50) larger."""
    objective = _objective(loss="wgan-gp", gradient_penalty=2.0)
    x = torch.randn(50, 2)
    torch.manual_seed(1)
    draws = objective.generator().sample((50,))
    torch.manual_seed(1)
    loss, accuracy = objective.critic_loss(x)
    torch.manual_seed(1)
    objective.generator().sample((50,))
    between = torch.lerp(x, draws, torch.rand(50, 1))
    penalty = (between.norm(dim=-1) - 1.0).square().mean()
    wasserstein = 0.5 * (draws.square().sum(-1) - x.square().sum(-1)).mean()
    assert loss.item() == pytest.approx((wasserstein + 2.0 * penalty).item(), rel=1e-5)
    assert accuracy.item() == pytest.approx((x.norm(dim=-1) > draws.norm(dim=-1)).float().mean().item())


def test_the_generators_loss_leaves_the_critic_alone():
    objective = dgm.Adversarial(dgm.Generator(2, 8), dgm.Critic(2, 8))
    objective(torch.randn(5, 2)).backward()
    assert all(p.grad is None and p.requires_grad for p in objective.critic.parameters())
    assert all(p.grad.abs().sum() > 0 for p in objective.generator.parameters())
    objective.zero_grad(set_to_none=True)
    objective.critic_loss(torch.randn(5, 2))[0].backward()
    assert all(p.grad is None for p in objective.generator.parameters())


def test_likelihood_of_a_flow_is_added_per_dimension():
    flow, x = dgm.RealNVP(2, transforms=2, hidden_features=(8,)), torch.randn(20, 2)
    values = []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        values.append(dgm.Adversarial(flow, dgm.Critic(2, 8), likelihood=weight)(x).item() if weight == 0.0 else None)
        torch.manual_seed(0)
        values[-1] = dgm.Adversarial(flow, MODULE_CRITIC, likelihood=weight)(x).item()
    assert values[1] - values[0] == pytest.approx(-3.0 * flow().log_prob(x).mean().item() / 2, rel=1e-4)


MODULE_CRITIC = dgm.Critic(2, 8)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), "minimax"), "loss='minimax', expected one of"),
        (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), r1=-1.0), "r1=-1.0, expected a finite number >= 0"),
        (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), critic_steps=0), "critic_steps=0"),
        (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), ema=1.0), "ema=1.0"),
        (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(3)), "event_shape of Generator"),
        (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2, None, 3)), "context_features of Generator"),
        (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), likelihood=1.0), "Generator has no density"),
    ],
)  # fmt: skip
def test_an_adversarial_objective_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- training --------------------------------------------------------------------------------------------------------


def small(**options):
    torch.manual_seed(0)
    return dgm.Adversarial(dgm.Generator(2, 16), dgm.Critic(2, 16), **{"pretrain": 2, **options})


ROWS = torch.randn(203, 2, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 20.0]) + 7.0


def run(objective, data=(ROWS,), **options):
    return dgm.fit(objective, data, **{"batch_size": 50, "max_steps": 60, "progress": False, "seed": 1, **options})


@pytest.mark.parametrize(
    "data, message",
    [
        (ROWS[:, :1], r"data have shape \(50, 1\), expected \(N, 2\)"),
        (torch.where(torch.arange(203)[:, None] == 9, torch.nan, ROWS), "holds 2 NaN"),
        ((ROWS, ROWS), "Generator is unconditional"),
    ],
)
def test_training_refuses_bad_data_and_changes_nothing(data, message):
    objective = small()
    before = [p.clone() for p in objective.parameters()]
    with pytest.raises(ValueError, match=message):
        run(objective, data)
    assert all((p == q).all() for p, q in zip(objective.parameters(), before, strict=True))


def test_training_refuses_images_outside_the_networks_range():
    generator = dgm.Generator((2, 2), nn.Sequential(nn.Linear(2, 4), nn.Sigmoid()), base=2)
    with pytest.raises(ValueError, match="Sigmoid, whose range is 0 to 1"):
        run(dgm.Adversarial(generator, dgm.Critic((2, 2), 8)), (torch.randint(0, 255, (100, 2, 2)).float(),))


def test_patience_is_refused():
    with pytest.raises(ValueError, match="adversarial loss need not fall"):
        run(small(), patience=3)


def test_history_holds_both_losses_accuracy_and_quality():
    """The last quality is that of the generator as it is afterwards, with its averaged weights."""
    objective = small()
    history = run(objective, max_steps=120, validation=(ROWS[:100],))
    assert len(history.loss) == len(history.critic_loss) == len(history.critic_accuracy) == 120
    assert [step for step, _, _ in history.quality] == [50, 100, 120]
    assert all(0.0 <= a <= 1.0 for a in history.critic_accuracy) and history.stopped == "limit reached"
    torch.manual_seed(0)
    assert objective.quality(ROWS[:100]) == history.quality[-1][1:] != history.quality[0][1:]
    pytest.importorskip("matplotlib").use("Agg")
    low, high = history.plot().get_ylim()
    assert low < sum(history.critic_loss[-50:]) / 50 < high and low < sum(history.loss[-50:]) / 50 < high


def test_the_generator_gets_the_running_average_of_its_weights():
    """Followed by hand through every step; the last weights (planted: ema=0) are others."""
    objective, seen = small(ema=0.9, critic_steps=2), []
    first = [p.detach().clone() for p in objective.generator.parameters()]
    plain = objective.generator_loss

    def watched(*batch):
        seen.append([p.detach().clone() for p in objective.generator.parameters()])
        return plain(*batch)

    objective.generator_loss = watched
    run(objective, max_steps=40)
    last = small(ema=0.0, critic_steps=2)
    run(last, max_steps=40)
    after_step = [*seen[-39:], [p.detach() for p in last.generator.parameters()]]
    average = first
    for step, weights in enumerate(after_step, 1):
        decay = min(0.9, (1.0 + step) / (10.0 + step))
        average = [decay * a + (1.0 - decay) * w for a, w in zip(average, weights, strict=True)]
    for a, p, q in zip(average, objective.generator.parameters(), last.generator.parameters(), strict=True):
        torch.testing.assert_close(a, p.detach(), atol=1e-5, rtol=1e-4)
        assert (p != q).any()


@pytest.mark.parametrize("batch_size", [50, None])
def test_resume_in_the_middle_of_an_epoch_is_bit_identical(tmp_path, batch_size):
    """Interrupted after 27 steps (epochs of 5 batches, 2 critic steps each); new draws on resume (planted: no rng) differ."""
    whole = small(critic_steps=2)
    history = run(whole, batch_size=batch_size)
    part, path = small(critic_steps=2), tmp_path / "gan.pt"
    plain, calls = part.critic_loss, []

    def interrupted(*batch):
        calls.append(1)
        if len(calls) == 55:  # the first of two critic steps of step 28
            raise KeyboardInterrupt
        return plain(*batch)

    part.critic_loss = interrupted
    saved = []
    from pyro_dgm.train.loop import Loop

    original = Loop._step

    def saving(self):
        original(self)
        if self.checkpoint and self.history.steps == 27 and not saved:
            saved.append(self._save())

    Loop._step = saving
    try:
        assert run(part, batch_size=batch_size, checkpoint=path).stopped == "interrupted"
        fresh = small(critic_steps=2)
        resumed = run(fresh, batch_size=batch_size, checkpoint=path)
    finally:
        Loop._step = original
    assert resumed.loss == history.loss and resumed.critic_loss == history.critic_loss
    assert resumed.quality == history.quality
    for name, value in whole.state_dict().items():
        assert name == "_extra_state" or (value == fresh.state_dict()[name]).all(), name
    assert str(fresh.distilled) == str(whole.distilled) != "None"


def test_steps_that_are_not_finite_are_left_out_and_four_times_twenty_end_the_fit():
    objective = small()
    plain, calls = objective.critic_loss, []

    def broken(*batch):
        calls.append(1)
        loss, accuracy = plain(*batch)
        return (loss * torch.nan if len(calls) in (7, 8) or len(calls) > 60 else loss), accuracy

    objective.critic_loss = broken
    assert run(objective, max_steps=50).skipped == [7, 8]
    words = "not finite for 20 steps up to step 191.*state of step 110 was restored"
    with pytest.raises(dgm.FitDiverged, match=words) as e, pytest.warns(UserWarning, match="at half the rate"):
        calls.clear()
        objective.critic_loss = lambda *b: (
            plain(*b)[0] * (torch.nan if len(calls) > 110 else 1.0),
            calls.append(1) or REAL[0],
        )
        run(objective, max_steps=1100)
    assert e.value.history.stopped == "diverged"
    assert all(p.isfinite().all() for p in objective.parameters())


def test_any_of_several_critic_steps_that_is_lost_is_recorded():
    """The first of the two of step 7; a record of the last one alone (planted) is empty."""
    objective, calls = small(critic_steps=2), []
    plain = objective.critic_loss

    def broken(*batch):
        calls.append(1)
        loss, accuracy = plain(*batch)
        return (loss * torch.nan if len(calls) == 13 else loss), accuracy

    objective.critic_loss = broken
    assert run(objective, max_steps=20).skipped == [7]


class Collapsed(nn.Module):
    """A generator's network that has forgotten all of the data but one point."""

    def __init__(self, spread):
        super().__init__()
        self.spread = spread
        self.free = nn.Parameter(torch.zeros(2))

    def forward(self, z):
        return self.spread * z + 1e-6 * self.free


def test_collapse_is_warned_of_once_and_a_good_generator_is_not():
    """The distribution is N(0, I): a spread of 0.05 is a collapse, a spread of 1 is right."""
    x = torch.randn(600, 2)
    for spread, expected in ((0.05, 1), (1.0, 0)):
        generator = dgm.Generator(2, Collapsed(spread), base=2, noise=0.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(dgm.Adversarial(generator, dgm.Critic(2, 8), pretrain=0), (x,), max_steps=200)
        assert sum("mode collapse" in str(w.message) for w in caught) == expected


def test_a_conditional_pair_learns_the_context():
    """x = 3 c + noise: the mean of draws at c = -1, 1; a generator that ignores c (planted: c shuffled) gives 0 for both."""
    c = torch.randn(2_000, 1)
    x = 3.0 * c + 0.5 * torch.randn(2_000, 1)
    torch.manual_seed(0)
    gan = dgm.Adversarial(dgm.Generator(1, 32, 2, 1), dgm.Critic(1, 32, 1), pretrain=0)
    run(gan, (x, c), max_steps=500, batch_size=128)
    for value in (-1.0, 1.0):
        mean = gan.generator(torch.full((2_000, 1), value)).sample().mean().item()
        assert abs(mean - 3.0 * value) < 0.5


def test_a_flow_as_generator_trains_by_both_losses():
    """Flow-GAN: with the likelihood in the loss the score of a shifted, stretched normal comes within 0.1 nat of the entropy."""
    x = ROWS.repeat(10, 1)[:2_000]
    flow = dgm.RealNVP(2, transforms=2, hidden_features=(16,))
    run(dgm.Adversarial(flow, dgm.Critic(2, 16), likelihood=1.0), (x,), max_steps=200, batch_size=200)
    gauss = dist.MultivariateNormal(ROWS.mean(0), ROWS.T.cov())
    assert -flow().log_prob(ROWS).mean() < -gauss.log_prob(ROWS).mean() + 0.1


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_ais_of_a_linear_generator_brackets_the_exact_evidence():
    """Lower and upper bound around the exact evidence of every row, and a gap of at most 0.2 nat."""
    generator, exact = linear_generator()
    z = torch.randn(6, 2)
    x = generator.likelihood(z).sample()
    found = dgm.evaluate.ais(generator, x, num_steps=200, num_chains=16, latents=z, seed=0)
    truth = exact.log_prob(x)
    assert ((found.value - truth).abs() < 5 * found.standard_error + 0.02).all()
    assert found.gap()[0] < 0.2 and (found.upper > truth - 0.1).all()


def test_evaluate_takes_draws_of_a_generator():
    """Draws of the exact distribution against fresh ones: no score tells them apart; against a wrong one C2ST does."""
    generator, exact = linear_generator()
    x, draws = exact.sample((1_500,)), generator().sample((1_500,))
    assert dgm.evaluate.c2st(x, draws, seed=0).p_value > 1e-3
    assert dgm.evaluate.energy_distance(x, draws, seed=0).p_value > 1e-3
    assert abs(dgm.evaluate.precision_recall_density_coverage(x, draws).coverage.value - 0.969) < 0.05
    assert dgm.evaluate.c2st(x, linear_generator(noise=0.05)[0]().sample((1_500,)), seed=0).p_value < 1e-3
