"""Units of generators, critics and ratios: raw contexts, and long tails."""

import copy

import torch

import pyro_dgm as dgm


def pairs(n=600):
    torch.manual_seed(0)
    a = torch.randn(n, 1)
    return a + 0.3 * torch.randn(n, 2), torch.cat([2007 + 10 * a, torch.full((n, 1), 5.0)], 1), torch.cat([a, 0 * a], 1)


def test_both_players_and_the_distilled_flow_read_contexts_in_units():
    """Draws follow the context. Planted faults: contexts without units; a flow that reads them raw (an error of 1, their spread)."""
    x, raw, _ = pairs()
    torch.manual_seed(0)
    gan = dgm.Adversarial(dgm.Generator(2, 32, context_features=2), dgm.Critic(2, 16, context_features=2), pretrain=150)
    dgm.fit(gan, (x, raw), batch_size=200, max_steps=5, progress=False, seed=0)
    for player in (gan.generator, gan.critic):
        assert abs(float(player.context_units.loc[0]) - 2007) < 1.5 and player.context_units.scale[1] == torch.inf
    made = gan.generator(raw).sample((20,)).mean(0)
    assert (made - (raw[:, :1] - 2007) / 10).square().mean().sqrt() < 0.5


def test_a_critic_scores_raw_contexts_as_those_in_units():
    """Planted fault: contexts that are read raw."""
    x, raw, scaled = pairs()
    critic = dgm.Critic(2, 16, context_features=2).standardize(x, raw)
    same = copy.deepcopy(critic)
    same.context_units.forget()
    torch.testing.assert_close(critic(x, raw), same(x, critic.context_units(raw)))
    other = copy.deepcopy(critic).standardize(x, scaled)
    torch.testing.assert_close(critic(x, raw), other(x, scaled), rtol=1e-3, atol=1e-3)


def test_long_tails_of_events_keep_the_density_given_the_latent():
    """Rows far out. Planted faults: units without the compression (63 nats off), a density without it."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(1.0).sample((2000, 2))
    generator = dgm.Generator(2, 16).standardize(x)
    assert not generator.standard.is_straight()
    z = generator.latents(5)
    like = generator.likelihood(z)
    far = x[x.abs().amin(1).topk(5).indices]
    u = generator.units(far)
    flat = torch.distributions.Normal(generator.location(z), generator.sigma).log_prob(u).sum(-1)
    slope = generator.standard.log_slopes(u).sum(-1)
    torch.testing.assert_close(like.log_prob(far), flat - slope, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(generator.push(z), generator.standard.inverse(generator.location(z)))


def test_a_ratio_takes_units_of_events_and_contexts():
    """Planted fault: no units, with which the ratio learns nothing in 200 steps."""
    x, raw, _ = pairs()
    ratio = dgm.DensityRatio(2, context_features=2)
    dgm.fit(dgm.LogisticRegression(ratio), (x, raw), max_steps=200, progress=False, seed=0)
    there = ratio(torch.ones(2), torch.tensor([2017.0, 5.0]))
    assert there > ratio(torch.ones(2), torch.tensor([1997.0, 5.0])) + 1.0
    assert ratio(torch.ones(2), torch.tensor([2017.0, 1e9])) == there
