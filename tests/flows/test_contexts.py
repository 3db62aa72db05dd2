"""Contexts as they stand in a table: families take their units by themselves, from data and from nothing else."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_dgm as dgm
from pyro_dgm.core import MLP
from pyro_dgm.flows import MixtureChain

N = 2000
SHORT = {"batch_size": 200, "max_steps": 250, "progress": False, "seed": 0}


def table():
    """Two numbers given a year, an income, a constant and a rare category; the contexts in units of a person's choice."""
    torch.manual_seed(0)
    a, b = torch.randn(2, N, 1)
    rare = (torch.rand(N, 1) < 0.01).float()
    x = torch.cat([a + 0.5 * b, a - b], 1) + 0.3 * torch.randn(N, 2)
    raw = torch.cat([2007 + 10 * a, 50_000 + 27_000 * b, torch.full((N, 1), 101325.0), rare], 1)
    return x, raw, torch.cat([a, b, 0.0 * a, rare], 1)


MAKE = {
    "MAF": lambda: dgm.MAF(2, context_features=4),
    "NSF": lambda: dgm.NSF(2, context_features=4, transforms=2),
    "MixtureChain": lambda: MixtureChain(2, context_features=4),
    "Conditional": lambda: dgm.vae.Conditional(2, 4, dgm.vae.normal, hidden_features=(64,)),
    "Encoded": lambda: dgm.vae.Encoded(MLP(4, 8), dgm.RealNVP(2, context_features=8), 4),
}


def nats(family, x, c):
    with torch.no_grad():
        return -float(family(c).log_prob(x).mean())


@pytest.mark.parametrize("name", MAKE)
def test_a_raw_table_scores_as_one_that_was_scaled_by_hand(name):
    """The truth is .43 nats, a normal without the context 2.9. Planted: raw contexts are 2 to 1e4 nats off in every family."""
    x, raw, scaled = table()
    scores = []
    for c in (raw, scaled):
        torch.manual_seed(1)
        family = MAKE[name]()
        dgm.fit(dgm.MaximumLikelihood(family), (x, c), **SHORT)
        scores.append(nats(family, x, c))
    assert abs(scores[0] - scores[1]) < 0.1 and scores[0] < 1.0


def test_flow_matching_takes_the_units_of_contexts():
    x, raw, _ = table()
    flow = dgm.FFJORD(2, context_features=4, steps=8)
    dgm.fit(dgm.FlowMatching(flow), (x, raw), **SHORT | {"max_steps": 600, "lr": 1e-2})
    assert nats(flow, x, raw) < 1.2  # 2.9 without the context


def test_a_loader_and_a_batch_of_any_shape_do_as_well():
    x, raw, _ = table()
    flow = dgm.MAF(2, context_features=4)
    loader = DataLoader(TensorDataset(x, raw), batch_size=200)
    dgm.fit(dgm.MaximumLikelihood(flow), loader, max_steps=5, progress=False, seed=0)
    torch.testing.assert_close(flow.context_units.loc[:2], raw.mean(0)[:2], rtol=2e-2, atol=0.0)
    assert flow(raw.reshape(20, 100, 4)).log_prob(x.reshape(20, 100, 2)).shape == (20, 100)
    spread = dgm.MAF(2, context_features=4).standardize(x, raw.reshape(20, 100, 4))
    torch.testing.assert_close(spread.context_units.loc, flow.context_units.loc, rtol=2e-2, atol=0.1)


def test_a_family_that_was_fitted_keeps_its_units():
    x, raw, _ = table()
    flow = dgm.MAF(2, context_features=4)
    dgm.fit(dgm.MaximumLikelihood(flow), (x, raw), **SHORT | {"max_steps": 5})
    before = copy.deepcopy(flow.context_units.state_dict())
    dgm.fit(dgm.MaximumLikelihood(flow), (x, raw + 500.0), **SHORT | {"max_steps": 5})
    for key, value in flow.context_units.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_family_that_was_trained_without_units_goes_on_without():
    """Planted: without the count of changes and the score it takes units, and is 3 nats worse."""
    x, _, scaled = table()
    c = 3.0 + 2.0 * scaled
    flow = dgm.MAF(2, context_features=4)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        (-flow(c).log_prob(x).mean()).backward()
        optimizer.step()
    again = dgm.MAF(2, context_features=4)
    again.load_state_dict(flow.state_dict())  # nothing counts its changes
    for family in (flow, again):
        score = nats(family, x, c)
        dgm.fit(dgm.MaximumLikelihood(family), (x, c), **SHORT | {"max_steps": 1, "lr": 1e-6})
        assert nats(family, x, c) < score + 0.1


class Regression(torch.nn.Module):
    """A model of a user: the context is data in the first flow, and a latent in the second."""

    def __init__(self):
        super().__init__()
        self.of_data = dgm.MAF(2, context_features=4)
        self.of_latents = dgm.MAF(2, context_features=1)

    def forward(self, x, c):
        z = pyro.sample("z", dist.Normal(torch.full((1,), 50.0), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.of_data(c), obs=x)
            pyro.sample("same", self.of_latents(z.expand(len(x), 1)), obs=x)


class Guide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.full((1,), 50.0))

    def forward(self, x, c):
        pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))


@pytest.mark.parametrize("batch_size", [None, 200])
def test_a_model_of_a_user_is_served_where_the_context_is_data(batch_size):
    """Planted: units of every context that a family is called with give the latent some."""
    x, raw, _ = table()
    model = Regression()
    bound = dgm.STL_ELBO(1)(model, Guide())
    dgm.fit(bound, (x, raw), batch_size=batch_size, max_steps=2, progress=False, seed=0)
    torch.testing.assert_close(model.of_data.context_units.loc[:2], raw.mean(0)[:2], rtol=2e-2, atol=0.0)
    assert model.of_latents.context_units.is_identity()


def test_a_context_may_require_gradients_through_its_units():
    x, raw, scaled = table()
    flow = dgm.MAF(2, context_features=4).standardize(x, raw)
    c = raw[:5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(flow(c).log_prob(x[:5]).sum(), c)
    u = flow.context_units(raw[:5]).requires_grad_()
    same = copy.deepcopy(flow)
    same.context_units.forget()
    (by_units,) = torch.autograd.grad(same(u).log_prob(x[:5]).sum(), u)
    torch.testing.assert_close(gradient[:, :2], by_units[:, :2] / flow.context_units.scale[:2], rtol=1e-3, atol=1e-9)
