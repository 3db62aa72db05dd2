"""Data of one normal law: the generator becomes that law, exactly, and posteriors with it as prior are those of the formula."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.flows.few_rows import Decorrelate
from pyro_dgm.flows.many_rows import _gain_of_columns, is_one_normal
from pyro_dgm.gan import distillation
from pyro_dgm.gan.distillation import distil
from pyro_dgm.train.descend import Stages

SIDE = 4
GRID = torch.cartesian_prod(torch.arange(float(SIDE)), torch.arange(float(SIDE)))
COVARIANCE = torch.exp(-(torch.cdist(GRID, GRID) ** 2) / 8.0) + 0.01 * torch.eye(SIDE**2)


def fields(n):
    return torch.distributions.MultivariateNormal(torch.linspace(-1.0, 2.0, SIDE**2), COVARIANCE).sample((n,))


def endless(x, size=250):
    while True:
        yield from zip(x[torch.randperm(len(x))].split(size))


def fitted(x, generator, steps=3, pretrain=60):
    gan = dgm.Adversarial(generator, dgm.Critic(generator.event_shape, 16), pretrain=pretrain)
    dgm.fit(gan, (x,), batch_size=250, max_steps=steps, progress=False, seed=0)
    return gan


def law_of(generator):
    """Mean and covariance of a generator whose map is straight, in the units of the data."""
    with torch.no_grad():
        centre = generator.location(torch.zeros(generator.base.features))
        weight = (generator.location(torch.eye(generator.base.features)) - centre).mT
        cov = weight @ weight.mT + generator.sigma.square().diag()
    s = generator.standard
    return s.loc + s.scale * centre, s.scale[:, None] * cov * s.scale


def given(mean, cov, y, seen=8, error=0.1):
    """Means and sds of the last entries, given noisy first ones."""
    gain = cov[:, :seen] @ torch.linalg.inv(cov[:seen, :seen] + error**2 * torch.eye(seen))
    return (mean + gain @ (y - mean[:seen]))[seen:], (cov - gain @ cov[:seen]).diagonal()[seen:].sqrt()


def test_fields_of_a_normal_law_are_learned_as_well_as_rows_say():
    """Conditional means within .1 exact sds, as the rows' own covariance gives them, and sds within 5 %; the map is straight.

    Planted faults: a covariance that is drawn 3 % to its diagonal (means .11 off, sds 8 %); the network not set to zero.
    """
    torch.manual_seed(0)
    x = fields(4_000)
    gan = fitted(x.reshape(-1, SIDE, SIDE), dgm.Generator((SIDE, SIDE)))
    generator = gan.generator
    assert gan.distilled.normal and "one normal law" in repr(gan.distilled)
    z = torch.randn(2, 50, SIDE**2)
    ends = generator.location(z)
    assert torch.allclose(generator.location(0.3 * z[0] + 0.7 * z[1]), 0.3 * ends[0] + 0.7 * ends[1], atol=1e-5)
    exact, offs = (torch.linspace(-1.0, 2.0, SIDE**2), COVARIANCE), []
    for truth in fields(10):
        y = truth[:8] + 0.1 * torch.randn(8)
        (mean, sd), (found, its_sd) = given(*exact, y), given(*law_of(generator), y)
        offs.append(((found - mean) / sd).abs().mean())
        assert ((its_sd / sd) - 1.0).abs().max() < 0.05
    assert torch.stack(offs).mean() < 0.1


@pytest.mark.slow
def test_a_posterior_with_it_is_that_of_the_formula():
    """AutoFlow at its defaults. Planted fault: a network of pieces, as the distillation of a flow leaves it (.3 sd, sds .8)."""
    torch.manual_seed(0)
    generator = fitted(fields(4_000), dgm.Generator(SIDE**2)).generator.requires_grad_(False)
    y = fields(1)[0, :8] + 0.1 * torch.randn(8)

    def model(y):
        x = generator.sample_site("x")
        pyro.sample("y", dist.Normal(x[..., :8], 0.1).to_event(1), obs=y)

    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), (y,), progress=False, seed=0)
    idata = dgm.from_svi(model, guide, y, num_samples=4_000, seed=0)
    mean, sd = given(*law_of(generator), y)
    x = torch.as_tensor(idata.posterior["x"].values).reshape(4_000, -1)[:, 8:]
    assert dgm.khat(idata).k < 0.5
    assert ((x.mean(0) - mean) / sd).abs().max() < 5.0 / math.sqrt(4_000)
    assert (x.std(0) / sd - 1.0).abs().max() < 0.06


def ring(n):
    angle = torch.randint(8, (n,)) * math.pi / 4
    return 2.0 * torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(n, 2)


def scales(n):
    return torch.randn(n, 6) * torch.where(torch.rand(n, 1) < 0.5, 0.7, 1.3)


def bent(n):
    z = torch.randn(n, 3)
    return torch.cat([z, z.roll(1, 1) + 0.3 * z.square() + 0.3 * torch.randn(n, 3)], 1)


def chequered(n):
    """Of four normal columns the product of three signs is one, which no covariance sees."""
    x = torch.randn(n, 4)
    x[:, 2] = x[:, 2].abs() * (x[:, 0] * x[:, 1]).sign()
    return x


def skewed(n):
    return (0.25 * fields(n)).exp()


@pytest.mark.parametrize("law, seems", [(fields, True), (ring, False), (scales, False), (bent, False),
                                        (chequered, False), (skewed, False)])  # fmt: skip
def test_one_normal_law_is_told_from_others(law, seems):
    """Planted fault: mixtures left out (scales); a law that splines see is mostly seen by the others too."""
    torch.manual_seed(1)
    x = law(1_000)
    u = (x - x.mean(0)) / x.std(0)
    assert is_one_normal(u, lambda some, left: distillation._gain(some, left, 400, Stages())) is seems


def test_splines_of_columns_gain_on_skewed_columns_alone():
    """Planted fault: no splines."""
    torch.manual_seed(1)
    for law, gains in ((skewed, True), (fields, False)):
        x = law(1_000)
        gain = _gain_of_columns(*((x - x.mean(0)) / x.std(0)).split([800, 200]))
        assert (gain.mean() > 2.0 * gain.std() / 200**0.5) == gains


def test_a_flow_gains_on_another_law_alone():
    """From the normal law that it begins as. Planted fault: no steps (no gain); nor is one of a normal law above its error."""
    torch.manual_seed(1)
    for law, gains in ((chequered, True), (lambda n: torch.randn(n, 4), False)):
        gain = distillation._gain(*law(1_000).split([800, 200]), 400, Stages())
        assert (gain.mean() > 2.0 * gain.std() / 200**0.5) == gains


def test_the_game_leaves_a_normal_law_as_it_is_unless_it_is_alone():
    """Planted fault: the game moves it (by 1e-5 a step, which bends the map)."""
    torch.manual_seed(0)
    gan = fitted(x := fields(1_000), dgm.Generator(SIDE**2, 16), steps=1)
    before = [p.clone() for p in gan.generator.parameters()]
    history = dgm.fit(gan, (x,), batch_size=250, max_steps=20, progress=False, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, gan.generator.parameters(), strict=True))
    assert all(math.isfinite(loss) for loss in history.loss)
    alone = dgm.Adversarial(gan.generator, gan.critic, pretrain=0)
    dgm.fit(alone, (x,), batch_size=250, max_steps=2, progress=False, seed=0)
    assert not all(torch.equal(a, b) for a, b in zip(before, gan.generator.parameters(), strict=True))


@pytest.mark.parametrize("noise", [None, 0.0, 0.08])
def test_output_noise_is_part_of_the_law(noise):
    """With any noise the law has the rows' covariance. Planted fault: noise on top of it (.006 with a noise of .08)."""
    torch.manual_seed(0)
    x = fields(4_000)
    root = Decorrelate().fit(x).tril
    generator = fitted(x, dgm.Generator(SIDE**2, 16, noise=noise)).generator
    assert (law_of(generator)[1] - root @ root.mT).abs().max() < 0.002


def test_a_short_latent_leaves_each_entry_its_own_noise():
    """Two factors and own noise: found as such. Planted fault: one round (the first noise is .03 off)."""
    torch.manual_seed(0)
    own = torch.tensor([0.3, 0.5, 0.4, 0.6, 0.5, 0.3])
    x = torch.randn(20_000, 2) @ torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.5], [0.0, 0.5, 1.0, 1.0, 1.0, 0.0]])
    x = x + own * torch.randn(20_000, 6)
    gan = fitted(x, dgm.Generator(6, 16, base=2))
    assert (gan.generator.sigma * gan.generator.standard.scale - own).abs().max() < 0.02
    assert (law_of(gan.generator)[1] - x.T.cov()).abs().max() < 0.02
    assert 0.5 < gan.distilled.carried < 0.95


def test_a_pixel_that_never_changes_stays_as_it_is():
    """Planted fault: it gets the variance one."""
    torch.manual_seed(0)
    x = torch.cat([fields(1_000), torch.full((1_000, 1), 7.0)], 1)
    generator = fitted(x, dgm.Generator(SIDE**2 + 1, 16)).generator
    assert (generator().sample((200,))[:, -1] - 7.0).abs().max() < 0.06


@pytest.mark.parametrize(
    "generator",
    [
        lambda: dgm.Generator(2, nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))),
        lambda: dgm.Generator(2, 16, base=dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1)),
        lambda: dgm.Generator(2, 16, context_features=1),
    ],
    ids=["a network of a user", "another latent", "a context"],
)
def test_other_generators_follow_a_flow(generator):
    assert not generator().may_be_straight


def test_few_rows_are_not_asked():
    gan = fitted(torch.randn(999, 2), dgm.Generator(2, 16))
    assert not gan.distilled.normal and gan.generator.straight.is_identity()


def test_asking_changes_nothing_for_another_law(monkeypatch):
    """Planted fault: random numbers that the question takes."""
    x, weights = ring(1_000), []
    for asked in (True, False):
        monkeypatch.setattr(dgm.Generator, "may_be_straight", asked)
        torch.manual_seed(0)
        distil(generator := dgm.Generator(2, 16).standardize(x), endless(x), 2)
        weights.append(torch.cat([p.detach().reshape(-1) for p in generator.parameters()]))
    assert torch.equal(*weights)


def test_a_longer_latent_and_a_stated_support_are_as_good():
    """exp of a field on positive numbers, with 20 latents for 16 entries. Planted fault: units of the data in the place of logs."""
    torch.manual_seed(0)
    x = fields(2_000)
    generator = fitted((0.3 * x).exp(), dgm.Generator(16, 16, 20, support=dist.constraints.positive)).generator
    assert not generator.straight.is_identity()
    assert (law_of(generator)[1] - (0.3 * x).T.cov()).abs().max() < 2e-3


def test_its_state_goes_into_another(tmp_path):
    """By a state, and by a file; a state of before there were straight maps has none."""
    generator = fitted(fields(1_000), dgm.Generator(SIDE**2, 16)).generator
    z = torch.randn(5, SIDE**2)
    again = dgm.Generator(SIDE**2, 16)
    again.load_state_dict(generator.state_dict())
    dgm.save(generator, tmp_path / "fields.pt")
    for other in (again, dgm.load(tmp_path / "fields.pt")):
        assert torch.equal(other.location(z), generator.location(z))
    old = {k: v for k, v in generator.state_dict().items() if not k.startswith("straight")}
    again.load_state_dict(old)
    assert again.straight.is_identity()
