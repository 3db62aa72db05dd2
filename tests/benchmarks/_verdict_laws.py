"""Posteriors of the bench of verdicts that are known exactly, have several modes, a learned prior, or many latents."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from tests.benchmarks import hierarchies
from tests.benchmarks import series as time_series
from tests.benchmarks._verdict_case import Case, changed, glm

# --- Laws that are known ---


def drawn_from(law, name="x", places=None):
    """A posterior that is a given law, with exact draws."""

    def model():
        pyro.sample(name, law)

    return Case(model, (), {}, {name: law.sample((40_000,))}, places)


def normal_law(d, condition):
    """Scales apart by the condition, turned."""
    turn = torch.linalg.qr(torch.randn(d, d)).Q
    root = torch.linalg.qr((turn * torch.logspace(0.0, np.log10(condition), d)).mT).R.mT
    return drawn_from(dist.MultivariateNormal(torch.ones(d), scale_tril=root * root.diagonal().sign()))


def student(d):
    return drawn_from(dist.MultivariateStudentT(torch.tensor(5.0), torch.zeros(d), torch.eye(d)))


def funnel(d, width):
    def model():
        v = pyro.sample("v", dist.Normal(0.0, width))
        pyro.sample("x", dist.Normal(torch.zeros(d - 1), (v / 2).exp()[..., None]).to_event(1))

    v = width * torch.randn(40_000)
    return Case(model, (), {}, {"v": v, "x": (v / 2).exp()[:, None] * torch.randn(40_000, d - 1)})


def banana(bend):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(bend * (a.square() - 1.0), 0.5))

    a = torch.randn(40_000)
    return Case(model, (), {}, {"a": a, "b": bend * (a.square() - 1.0) + 0.5 * torch.randn(40_000)})


def skewed():
    """Positive latents with nothing to say about them."""

    def model():
        pyro.sample("g", dist.Gamma(1.5, 1.0))
        pyro.sample("h", dist.Beta(1.5, 6.0))
        pyro.sample("t", dist.LogNormal(0.0, 1.0))

    laws = {"g": dist.Gamma(1.5, 1.0), "h": dist.Beta(1.5, 6.0), "t": dist.LogNormal(0.0, 1.0)}
    return Case(model, (), {}, {k: v.sample((40_000,)) for k, v in laws.items()})


def angles():
    """A direction that eight noisy ones tell."""
    y = dist.VonMises(2.9, 3.0).sample((8,))

    def model(y):
        mu = pyro.sample("mu", dist.VonMises(0.0, 0.1))
        k = pyro.sample("k", dist.Gamma(2.0, 0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.VonMises(mu, k), obs=y)

    return Case(model, (y,), {"stale data": (model, (y - 0.7,)), "a subsample": (model, (y[:4],))})


# --- Several modes ---


def modes(count, d, apart=8.0):
    place = torch.randn(count, d)
    place *= apart / torch.pdist(place).min()
    sd, weight = 0.5 + torch.rand(count, d), (0.3 + torch.rand(count))
    law = dist.MixtureSameFamily(dist.Categorical(weight / weight.sum()), dist.Normal(place, sd).to_event(1))
    prior = dist.Normal(torch.zeros(d), 1.5 * float(place.abs().max())).to_event(1)

    def model():
        x = pyro.sample("x", prior)
        pyro.factor("f", law.log_prob(x) - prior.log_prob(x))

    return Case(model, (), {}, {"x": law.sample((40_000,))}, place.numpy())


def sign():
    """A sign that the data leave nearly open, on a grid."""
    y = 3.0 + 0.7 * torch.randn(8)

    def model(y):
        a = pyro.sample("a", dist.Normal(0.15, 1.5))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(a.square(), s), obs=y)

    a, s = torch.meshgrid(torch.linspace(-3.0, 3.0, 3001), torch.linspace(0.05, 4.0, 400), indexing="ij")
    log_p = dist.Normal(0.15, 1.5).log_prob(a) + dist.HalfNormal(1.0).log_prob(s)
    for each in y:
        log_p = log_p + dist.Normal(a.square(), s).log_prob(each)
    index = log_p.flatten().softmax(0).multinomial(40_000, replacement=True)
    places = np.array([[-(3.0**0.5), 0.7], [3.0**0.5, 0.7]])
    return Case(model, (y,), {}, {"a": a.flatten()[index], "s": s.flatten()[index]}, places)


# --- Learned priors ---


def weighted(latent, log_likelihood):
    """Draws of a prior ``(n, d)``, weighted."""
    return {"z": latent[log_likelihood.softmax(0).multinomial(40_000, replacement=True)]}


def generator(noise=0.35):
    """Two latents behind a network of fixed weights, by four noisy outputs: bent, often with two modes."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).requires_grad_(False)
    y = net(torch.randn(2)) + noise * torch.randn(4)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(net(z), noise).to_event(1), obs=y)

    z = torch.randn(400_000, 2)
    stale = (model, (y + torch.tensor([0.5, 0.0, 0.0, 0.0]),))
    return Case(model, (y,), {"stale data": stale, "another model": (generator_model(net, 2.0 * noise), (y,))},
                weighted(z, dist.Normal(net(z), noise).to_event(1).log_prob(y)))  # fmt: skip


def generator_model(net, noise):
    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(net(z), noise).to_event(1), obs=y)

    return model


def flow_prior():
    """Three latents whose prior is a flow that learned a ring, by one noisy sum."""
    flow = dgm.RealNVP(3)
    angle = 6.3 * torch.rand(2000)
    ring = torch.stack([angle.cos(), angle.sin(), 0.3 * torch.randn(2000)], -1) * 2.0 + 0.4 * torch.randn(2000, 3)
    dgm.fit(dgm.MaximumLikelihood(flow), ring, max_steps=150, progress=False, seed=0)
    flow.requires_grad_(False)
    y = torch.tensor(1.5) + 0.2 * torch.randn(())

    def model(y):
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z.sum(-1), 0.7), obs=y)

    z = flow().sample((200_000,))
    return Case(model, (y,), {"stale data": (model, (y + 1.5,))}, weighted(z, dist.Normal(z.sum(-1), 0.7).log_prob(y)))


# --- More than fifty latents ---


def many_groups(kind, groups):
    known, y = hierarchies.drawn(kind, groups, int(torch.randint(10_000, (1,))))
    model = hierarchies.hierarchy(kind)
    return Case(model, (known, y), {"stale data": (model, (known, y.roll(1, 0)))})


def many_slopes(d):
    x = torch.randn(4 * d, d) / d**0.5
    y = torch.bernoulli(torch.sigmoid(2.0 * (x @ torch.randn(d))))
    model = glm("logistic")
    return Case(
        model, (x, y), {"stale data": (model, (x, changed(y, 0.3))), "a subsample": (model, (x[: 2 * d], y[: 2 * d]))}
    )


def many_times(kind, length):
    y = time_series.DRAWN[kind](length, 0)
    model = time_series.MODELS[kind]
    return Case(model, (y,), {"stale data": (model, (y.flip(0),))})
