"""A generator distilled from a continuous flow: every mode, the distribution given a context, a short latent, any base."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.gan import distillation
from pyro_dgm.gan.distillation import Distilled, distil, share_near
from pyro_dgm.train.batches import first_rows


def endless(*tensors, size=500):
    while True:
        order = torch.randperm(len(tensors[0]))
        yield from zip(*(t[order].split(size) for t in tensors), strict=True)


def test_distilled_draws_cover_every_mode(monkeypatch):
    """Before L-BFGS. Planted faults: no distillation (two modes at most); time that runs backwards in the flow's loss (share below .3)."""
    torch.manual_seed(0)
    monkeypatch.setattr(distillation, "_ROUNDS", 0)
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

    monkeypatch.setattr("pyro_dgm.gan.teacher.FFJORD", noted)
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


def modes(n):
    angle = torch.randint(8, (n,)) * math.pi / 4
    return 2.0 * torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(n, 2)


def narrow(width=12, latents=2):
    layers = [nn.Linear(latents, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)]
    return dgm.Generator(2, nn.Sequential(*layers), latents)


def test_a_network_that_lacks_is_taught_by_curvature(monkeypatch):
    """Twelve units a layer. Planted fault: no rounds."""
    torch.manual_seed(0)
    monkeypatch.setattr(distillation, "_SHARPENED", 20)
    monkeypatch.setattr(distillation, "_ROUNDS", 3)
    x = modes(4000)
    found = distil(narrow().standardize(x), endless(x), 600)
    assert found.rows > 0.98 and found.flow > 0.9
    assert found.flow - found.generator[-1] < 0.7 * (found.flow - found.generator[0])


def test_steps_that_were_too_large_are_taken_again_in_small(monkeypatch):
    """Planted fault: no second try, and hardly a draw is near the rows."""
    torch.manual_seed(0)
    monkeypatch.setattr(distillation, "_ROUNDS", 0)
    monkeypatch.setattr(distillation, "_rate", lambda generator: 3.0)
    monkeypatch.setattr(distillation, "_CAREFUL", 3e-3)
    found = distil(narrow(64).standardize(x := modes(2000)), endless(x), 600)
    assert found.generator[0] < 0.5 and found.generator[1] > 0.6


def test_a_network_that_does_not_lack_is_left_alone(monkeypatch):
    monkeypatch.setattr(distillation, "_SHORT", 1.0)
    monkeypatch.setattr(distillation, "_ASTRAY", 1.0)
    found = distil(narrow().standardize(x := modes(500)), endless(x), 320)
    assert len(found.generator) == 1


def test_a_round_that_makes_it_worse_is_undone(monkeypatch):
    """Planted fault: the weights of the last round are kept."""
    torch.manual_seed(0)
    generator = narrow().standardize(x := modes(1000))
    monkeypatch.setattr(distillation, "_SHORT", -1.0)
    monkeypatch.setattr(distillation, "_ASTRAY", 1.0)
    before = {}

    def spoil(self, closure=None):
        before.update({k: v.clone() for k, v in generator.state_dict().items()} if not before else {})
        for p in self.param_groups[0]["params"]:
            p.data.fill_(math.nan)

    monkeypatch.setattr(distillation.ByCurvature, "step", spoil)
    found = distil(generator, endless(x), 320)
    assert len(found.generator) == 2 and not found.gained()
    assert all(torch.equal(before[k], v) for k, v in generator.state_dict().items() if k.startswith("network"))


def played(x, spoil, again=False):
    """A pair whose generator is spoiled in its first steps of the game, and how far it is from its distillation at the end."""
    torch.manual_seed(0)
    gan = dgm.Adversarial(narrow(64), dgm.Critic(2, 8), pretrain=400, ema=0.0)
    gan.prepare(endless(x))
    if again:
        dgm.fit(gan, (x,), max_steps=1, progress=False)
    before = [p.detach().clone() for p in gan.generator.network.parameters()]
    loss = gan.generator_loss

    def spoiling(*batch):
        with torch.no_grad():
            spoil(gan.generator)
        return loss(*batch)

    gan.generator_loss = spoiling
    dgm.fit(gan, (x,), max_steps=1, progress=False)
    pairs = zip(before, gan.generator.network.parameters(), strict=True)
    return gan, max((p - q).abs().max().item() for p, q in pairs)


def blur(generator):
    generator.network[-1].weight.mul_(1.1)


@pytest.mark.filterwarnings("ignore:fit. at step", "ignore:fit. .* of the generator's draws lie near")
def test_a_game_that_costs_draws_near_the_data_is_undone(monkeypatch):
    """Planted faults: the game's weights are kept; a second fit, perhaps to other data, is undone too."""
    monkeypatch.setattr(distillation, "_ROUNDS", 0)
    gan, moved = played(modes(2000), blur)
    assert gan.distilled.undone and moved == 0.0 and "the game undone" in repr(gan.distilled)
    gan, moved = played(modes(2000), blur, again=True)
    assert not gan.distilled.undone and moved > 0.01


class Apart(nn.Module):
    """Half of the draws at 0 and half so far from it, but for a few between."""

    def __init__(self):
        super().__init__()
        self.far = nn.Parameter(torch.zeros(()))

    def forward(self, z):
        return self.far * torch.sigmoid(20.0 * z)


def test_a_game_that_brings_rows_near_draws_is_kept():
    """After a distillation that has collapsed, and the other way round.

    Planted faults: draws near rows alone are counted; all games are undone.
    """
    rows = torch.where(torch.rand(4000, 1) < 0.5, 0.0, 4.0) + 0.1 * torch.randn(4000, 1)
    for before, after in ((0.0, 4.0), (4.0, 0.0)):
        found = Distilled(rows[:2000], None, 1.0, 1.0, 1.0, 4000)
        generator = dgm.Generator(1, Apart(), 1, noise=0.1)
        nn.init.constant_(generator.network.far, before)
        found.weights = {k: v.clone() for k, v in generator.state_dict().items()}
        nn.init.constant_(generator.network.far, after)
        at_the_end = found.share(generator)
        found.undo_game(generator)
        assert generator.network.far == 4.0 and found.undone == (before == 4.0)
        assert (at_the_end < 0.95) == (after == 4.0)


@pytest.mark.parametrize(
    "width, latents, rate", [(16, 2, 4e-2), (32, 2, 4e-2), (64, 32, 2e-2), (128, 2, 1e-2), (256, 2, 1e-2)]
)
def test_narrow_networks_take_larger_steps(width, latents, rate):
    assert distillation._rate(narrow(width, latents)) == pytest.approx(rate)


def test_entries_beyond_those_of_the_event_are_not_heard():
    """Until then all are; afterwards no draw depends on them, in a copy by state too. Planted fault: all are heard."""
    torch.manual_seed(0)
    generator = narrow(latents=5).standardize(x := modes(500))
    z = torch.randn(20, 5)
    other = torch.cat([z[:, :2], torch.randn(20, 3)], 1)
    assert not torch.equal(generator.location(z), generator.location(other))
    distil(generator, endless(x), 2)
    again = narrow(latents=5)
    again.load_state_dict(generator.state_dict())
    for made in (generator, again):
        assert torch.equal(made.location(z), made.location(other))
    assert not torch.equal(generator.location(z), generator.location(z.flip(0)))


def test_the_share_near_rows_is_one_for_the_same_distribution_and_misses_bridges():
    """4 of 5 draws at modes, the others between them. Planted fault: reach without neighbours (no draw is near)."""
    torch.manual_seed(0)
    draws = modes(2000)
    draws[:400] = 0.7 * draws[:400]
    assert share_near(modes(2000), modes(2000)) > 0.99
    assert share_near(draws, modes(2000)) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    "flow, steps, generator, carried, message",
    [
        (0.98, 4000, [0.80, 0.90], 1.0, "lacks time .80.0%, 90.0% after .*: give Adversarial pretrain=8000"),
        (0.98, 500, [0.80, 0.801], 1.0, "lacks time .*: give Adversarial pretrain=1000"),
        (0.98, 4000, [0.80, 0.801], 1.0, "lacks capacity .*deeper or wider"),
        (0.85, 4000, [0.84], 0.6, "latent lacks entries: they carry 60% of the variance"),
    ],
)
def test_what_lacks_is_told(monkeypatch, flow, steps, generator, carried, message):
    """Shares of the flow, of the generator after each part, and what a latent carries; the trained one has the last."""
    monkeypatch.setattr(Distilled, "share", lambda self, trained: generator[-1])
    found = Distilled(torch.zeros(5, 2), None, 0.99, flow, carried, steps, generator)
    with pytest.warns(UserWarning, match=message):
        found.tell(dgm.Generator(2))


@pytest.mark.parametrize("flow, share, carried", [(0.98, 0.96, 1.0), (0.85, 0.84, 1.0), (0.98, 0.97, 0.6)])
def test_a_generator_that_is_as_good_as_its_flow_is_not_warned_of(monkeypatch, recwarn, flow, share, carried):
    monkeypatch.setattr(Distilled, "share", lambda self, trained: share)
    Distilled(torch.zeros(5, 2), None, 0.99, flow, carried, 500, [share]).tell(dgm.Generator(2))
    assert not recwarn.list


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


def test_a_state_of_before_latents_were_left_out_is_loaded():
    """Planted fault: the key that such a state lacks is asked for."""
    generator = dgm.Generator(2, base=5)
    state = {k: v for k, v in generator.state_dict().items() if k != "heard"}
    generator.hear(2)
    generator.load_state_dict(state)
    assert generator.heard.tolist() == [1.0] * 5
