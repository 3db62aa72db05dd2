"""A generator distilled from a continuous flow: every mode, the distribution given a context, a short latent, any base."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.gan.distillation import distil
from pyro_dgm.train.batches import first_rows


def endless(*tensors, size=500):
    while True:
        order = torch.randperm(len(tensors[0]))
        yield from zip(*(t[order].split(size) for t in tensors), strict=True)


def test_distilled_draws_cover_every_mode():
    """Planted faults: no distillation (two modes at most); time that runs backwards in the flow's loss (share below .3)."""
    torch.manual_seed(0)
    angle = torch.arange(8) * math.pi / 4
    centres = 2.0 * torch.stack([angle.cos(), angle.sin()], -1)
    x = centres[torch.randint(8, (4000,))] + 0.1 * torch.randn(4000, 2)
    gan = dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), pretrain=700)
    gan.prepare(endless(x))
    near = torch.cdist(gan.generator().sample((2000,)), centres).min(-1)
    share = torch.bincount(near.indices[near.values < 0.4], minlength=8) / 2000
    assert share.min() > 0.07 and share.sum() > 0.85


@pytest.mark.slow
def test_images_are_distilled_from_a_wide_flow_of_all_pixels():
    """Coverage of held-out digits .64. Planted faults: a flow of width 64 (.38), the first 32 principal components (.52)."""
    torch.manual_seed(0)
    x = torch.tensor(pytest.importorskip("sklearn.datasets").load_digits().images).float()
    x = dgm.Dequantize(17)(x, torch.Generator().manual_seed(0))[torch.randperm(1797)]
    generator = dgm.Generator((8, 8)).standardize(x[:1297])
    distil(generator, endless(x[:1297], size=128), 1000)
    near = dgm.evaluate.precision_recall_density_coverage(x[1297:], generator().sample((500,)))
    assert near.coverage.value > 0.58


@pytest.mark.parametrize("event, width", [(1, 64), (2, 64), (3, 96), (8, 128), (20, 128), (40, 160), ((8, 8), 256)])
def test_the_flow_is_wider_for_more_entries(monkeypatch, event, width):
    """Planted fault: 64 up to 16 entries, which leaves conditionals of eight 20 % too wide (docs/implicit.md)."""
    made = []
    flow = dgm.FFJORD

    def noted(*args, **kwargs):
        made.append(kwargs["hidden_features"])
        return flow(*args, **kwargs)

    monkeypatch.setattr("pyro_dgm.gan.distillation.FFJORD", noted)
    generator = dgm.Generator(event)
    distil(generator, endless(torch.randn(600, *generator.event_shape)), 1)
    assert made == [width]


@pytest.mark.filterwarnings("ignore:fit. at step")
@pytest.mark.parametrize("pretrain, share", [(2, 0.01), (0, 1.0)])
def test_a_distilled_generator_moves_slowly(pretrain, share):
    """Adam's first step is the rate itself. Planted fault: a tenth of the critic's rate (it blurs distilled digits)."""
    torch.manual_seed(0)
    gan = dgm.Adversarial(dgm.Generator(2, 8), dgm.Critic(2, 8), pretrain=pretrain, ema=0.0)
    gan.prepare(endless(x := torch.randn(500, 2)))
    before = [[p.detach().clone() for p in player.parameters()] for player in gan.players()]
    dgm.fit(gan, (x,), max_steps=1, lr=1e-3, progress=False)
    moved = [
        max((p.detach() - q).abs().max().item() for p, q in zip(player.parameters(), old, strict=True))
        for player, old in zip(gan.players(), before, strict=True)
    ]
    assert moved[1] / moved[0] == pytest.approx(share, rel=0.2)


@pytest.mark.parametrize(
    "event, flow, latents, width", [(2, 8000, 2, 128), ((8, 8), 4000, 64, 256), (40, 4000, 40, 160)]
)
def test_images_take_fewer_steps_of_wider_networks(event, flow, latents, width):
    gan = dgm.Adversarial(dgm.Generator(event), dgm.Critic(event))
    assert (gan.steps, gan.generator.base.features) == (flow, latents)
    assert gan.generator.network[0].out_features == width


@pytest.mark.parametrize(
    "rows, size, given, expected",
    [
        (98, 98, None, 500),
        (1000, 128, None, 4000),
        (1000, 1000, None, 4000),
        (9000, 32, None, 8000),
        (98, 98, 9000, 9000),
    ],
)
def test_few_rows_are_not_learned_by_heart(monkeypatch, rows, size, given, expected):
    """Planted faults: rows counted with their repetitions (8,000 for 1,000 rows); a cap on steps that were asked for."""
    taken = []
    monkeypatch.setattr(
        "pyro_dgm.gan.adversarial.distil", lambda generator, batches, steps, stages: taken.append(steps)
    )
    gan = dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), pretrain=given)
    gan.prepare(endless(torch.randn(rows, 2), size=size))
    assert taken == [expected]


def test_a_trained_pair_is_left_as_it_is():
    torch.manual_seed(0)
    gan, batch = dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), pretrain=2), (torch.randn(50, 2),)
    gan.prepare(iter([batch] * 100))
    before = [p.clone() for p in gan.parameters()]
    gan.prepare(iter([batch] * 100))
    assert all(torch.equal(a, b) for a, b in zip(before, gan.parameters(), strict=True))
    with pytest.raises(ValueError, match="pretrain=-1, expected a whole number >= 0"):
        dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), pretrain=-1)


def test_draws_are_distilled_given_their_contexts():
    """x = c + small noise. Planted fault: contexts of other rows beside the flow's ends."""
    torch.manual_seed(0)
    c = 3.0 + 2.0 * torch.randn(3000, 1)
    x = c + 0.2 * torch.randn(3000, 1)
    generator = dgm.Generator(1, 64, context_features=1).standardize(x)
    distil(generator, endless(x, c), 400)
    error = generator(c).sample() - c
    assert float(error.abs().mean()) < 0.5  # 1.6 for draws that do not know c


def test_what_a_short_latent_cannot_carry_becomes_noise():
    """Two principal components of five, and noise of its own for each entry. Planted fault: the first noise left at 0.1."""
    torch.manual_seed(0)
    own = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.1])
    x = torch.randn(6000, 2) @ torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    x = x + own * torch.randn(6000, 5)
    generator = dgm.Generator(5, base=2).standardize(x)
    distil(generator, endless(x), 500)
    assert (generator().sample((20_000,)).T.cov() - x.T.cov()).abs().max() < 0.2
    assert 2.0 < (generator.sigma[3] / generator.sigma[0]).item()


@pytest.mark.parametrize(
    "generator",
    [
        lambda: dgm.Generator(2, 64, base=dist.Uniform(torch.zeros(3), torch.ones(3)).to_event(1)),
        lambda: dgm.Generator((1, 2), 64),
        lambda: dgm.Generator(2, nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2), nn.Tanh())),
        lambda: dgm.Generator(2, 64, noise=0.05),
    ],
    ids=["uniform latent, longer than x", "event of two dimensions", "bounded network", "fixed noise"],
)
def test_any_generator_is_distilled(generator):
    """Planted fault: the flow starts from a normal whatever the latent is (the uniform latent then misses)."""
    torch.manual_seed(0)
    x = torch.where(torch.rand(3000, 1) < 0.5, -0.7, 0.7) + 0.1 * torch.randn(3000, 2)
    x = x.clamp(-1.0, 1.0)
    made = generator()
    rows = x.reshape(-1, *made.event_shape)
    made.standardize(rows)
    distil(made, endless(rows), 400)
    draws = made().sample((2000,)).reshape(-1, 2)
    assert ((draws.abs() - 0.7).norm(dim=-1) < 0.5).float().mean() > 0.8
    assert 0.4 < float((draws[:, 0] > 0).float().mean()) < 0.6


def test_data_given_whole_are_taken_in_part(monkeypatch):
    """With batch_size=None a step sees 512 rows, not all."""
    seen = []
    flow = type(dgm.FFJORD(2))
    own = flow.velocity
    monkeypatch.setattr(flow, "velocity", lambda self, t, u, c=None: (seen.append(len(u)), own(self, t, u, c))[1])
    distil(dgm.Generator(2, 8), iter([(torch.randn(3000, 2),)] * 30), 3)
    assert seen == [512] * 3


def test_batches_are_gathered():
    x, context = first_rows(iter([(torch.ones(4, 2), torch.zeros(4, 1))] * 9), 10)
    assert x.shape == (12, 2) and context.shape == (12, 1)
