"""Ensembles: an even mixture, whose members are trained apart."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.flows import Ensemble, MixtureChain
from pyro_dgm.flows.ensemble import members_of


class Fixed(dgm.DistributionModule):
    """A normal law at a place, whatever the context."""

    def __init__(self, loc, sd=1.0):
        super().__init__(1, 1)
        self.loc, self.sd = loc, sd

    def build(self, context):
        return dist.Normal(self.loc + 0.0 * context, self.sd).to_event(1)


def apart(*places):
    return Ensemble([Fixed(loc) for loc in places])


@pytest.mark.parametrize("shape", [(), (3,), (4000,), (50, 60)])
def test_draws_and_density_are_those_of_the_even_mixture(shape):
    torch.manual_seed(0)
    q = apart(-10.0, 0.0, 10.0)(torch.zeros(5, 1))
    x = q.sample(shape)
    assert x.shape == (*shape, 5, 1)
    exact = torch.stack([dist.Normal(m, 1.0).log_prob(x[..., 0]) for m in (-10.0, 0.0, 10.0)]).logsumexp(0)
    assert torch.allclose(q.log_prob(x), exact - math.log(3.0), atol=1e-5)
    if len(x) > 1000:
        shares = torch.stack([(x[..., 0] - m).abs() < 5.0 for m in (-10.0, 0.0, 10.0)]).double().mean(1)
        assert float((shares - 1 / 3).abs().max()) < 0.02


def test_entries_of_a_batch_choose_their_members_by_themselves():
    """Planted: one choice for the whole batch, which the density does not have."""
    torch.manual_seed(0)
    for n in (4, 400):
        x = apart(-10.0, 10.0)(torch.zeros(300, 1)).sample((n,))[..., 0] > 0.0
        both = (x.any(1) & ~x.all(1)).double().mean()
        assert float(both) == 1.0


def test_disagreement_is_between_none_and_log_of_the_number():
    context = torch.zeros(2000, 1)
    for places, expected in (((0.0, 0.0), 0.0), ((-20.0, 20.0), math.log(2.0))):
        family = apart(*places)
        found = family.disagreement(context, family(context).sample())
        assert abs(float(found.mean()) - expected) < 1e-3


def test_members_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="expected one"):
        Ensemble([MixtureChain(2, 1), MixtureChain(3, 1)])


def model(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture(scope="module")
def trained():
    pyro.set_rng_seed(0)
    guide = dgm.AmortizedGuide(model, observed=["x"], ensemble=3)
    sims = dgm.simulate(model, 2000, observed=["x"], seed=0, progress=False)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=250, progress=False, seed=0)
    return guide


def test_members_learn_apart_and_agree_where_simulations_tell(trained):
    """Exact: x ~ N(mu, 2) each, so mu given three is N(mean * 1.5 / 2.5, 1 / 2.5)."""
    own = trained.groups[0].family.members
    first, second = (torch.cat([p.flatten() for p in m.parameters()]) for m in own[:2])
    assert not torch.allclose(first, second)
    posterior = trained.condition(x=torch.tensor([0.5, 1.0, 1.5]))
    draws = posterior.sample((4000,))["mu"]
    assert abs(float(draws.mean()) - 0.6) < 0.08 and abs(float(draws.std()) - 0.4**0.5) < 0.06
    amount, error = posterior.disagreement(500)
    assert 0.0 < float(amount) < 0.02 and float(error) < 0.005


def test_they_disagree_where_nothing_was_simulated(trained):
    with pytest.warns(UserWarning, match="condition"):
        far = trained.condition(x=torch.tensor([30.0, -40.0, 35.0]))
    near = trained.condition(x=torch.tensor([0.5, 1.0, 1.5]))
    assert float(far.disagreement(500)[0]) > 5.0 * float(near.disagreement(500)[0])


def test_many_data_sets_and_a_guide_without_an_ensemble(trained):
    assert trained.condition(x=torch.zeros(6, 3)).disagreement(50)[0].shape == (6,)
    alone = dgm.AmortizedGuide(model, observed=["x"])
    with pytest.warns(UserWarning, match="never trained"):
        posterior = alone.condition(x=torch.zeros(3))
    with pytest.raises(ValueError, match="ensemble=5"):
        posterior.disagreement()


def fitted(n, ensemble=None, **limits):
    pyro.set_rng_seed(0)
    guide = dgm.AmortizedGuide(model, observed=["x"], ensemble=ensemble)
    sims = dgm.simulate(model, n, observed=["x"], seed=0, progress=False)
    dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=0, **limits)
    return guide


def members(guide):
    return [len(members_of(group.family)) for group in guide.groups]


def test_few_simulations_without_a_limit_are_learned_by_five(tmp_path):
    guide = fitted(150, patience=1, checkpoint=tmp_path / "fit.pt")
    assert members(guide) == [5, 5]
    assert members(fitted(150, max_steps=5)) == members(fitted(150, ensemble=1, patience=1)) == [1, 1]
    again = dgm.AmortizedGuide(model, observed=["x"])
    again.load_state_dict(guide.state_dict())
    x = torch.tensor([0.5, 1.0, 1.5])
    values = guide.condition(x=x).sample((5,))
    assert torch.equal(again.condition(x=x).log_prob(values), guide.condition(x=x).log_prob(values))
