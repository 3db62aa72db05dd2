"""The first arrangement of a generator: a distance that is right, and modes that are met before the critic looks."""

import math

import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.core.data import first_rows
from pyro_dgm.objectives.sliced import arrange, sliced_distance


def test_the_distance_of_a_shift_is_its_mean_projection():
    """E|w . d| over directions w of the plane is 2 |d| / pi. Planted fault: projections that are not sorted (1.1 apart)."""
    torch.manual_seed(0)
    x = torch.randn(4000, 2)
    shifted = x[torch.randperm(4000)] + torch.tensor([3.0, 4.0])
    assert abs(float(sliced_distance(x, shifted, 4000)) - 10.0 / math.pi) < 0.1
    assert float(sliced_distance(x, x[torch.randperm(4000)])) < 1e-6


def test_arranged_draws_cover_every_mode():
    """Planted fault: no arrangement; an untrained generator covers at most two of the eight modes."""
    torch.manual_seed(0)
    angle = torch.arange(8) * math.pi / 4
    centres = 2.0 * torch.stack([angle.cos(), angle.sin()], -1)
    x = centres[torch.randint(8, (4000,))] + 0.1 * torch.randn(4000, 2)
    gan = dgm.Adversarial(dgm.Generator(2), dgm.Critic(2))
    gan.pretrain(iter([(part,) for part in x.split(200)] * 200))
    near = torch.cdist(gan.generator().sample((2000,)), centres).min(-1)
    share = torch.bincount(near.indices[near.values < 0.4], minlength=8) / 2000
    assert share.min() > 0.02 and share.sum() > 0.35


def test_a_trained_pair_is_left_as_it_is():
    torch.manual_seed(0)
    gan, batch = dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), pretrain=2), (torch.randn(50, 2),)
    gan.pretrain(iter([batch] * 100))
    before = [p.clone() for p in gan.parameters()]
    gan.pretrain(iter([batch] * 100))
    assert all(torch.equal(a, b) for a, b in zip(before, gan.parameters(), strict=True))
    with pytest.raises(ValueError, match="pretrain=-1, expected a number of steps"):
        dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), pretrain=-1)


def test_conditional_draws_are_arranged_beside_their_contexts():
    """x = c + small noise: the conditional mean follows c. Planted fault: a distance of x alone, which pairs at random."""
    torch.manual_seed(0)
    c = torch.randn(3000, 1)
    x = 2.0 * c + 0.2 * torch.randn(3000, 1)
    generator = dgm.Generator(1, 32, context_features=1).standardize(x)
    units = lambda r: (r - x.mean(0)) / x.std(0)
    arrange(generator, units, iter([(x, c)] * 300), 200)
    draws = generator(c).sample()
    assert torch.corrcoef(torch.cat([draws, c], 1).T)[0, 1] > 0.9


def test_batches_are_gathered():
    x, context = first_rows(iter([(torch.ones(4, 2), torch.zeros(4, 1))] * 9), 10)
    assert x.shape == (12, 2) and context.shape == (12, 1)
