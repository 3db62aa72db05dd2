"""Models whose log joint is not a plain vectorised sum: enumerated sites, matrix products, failing factorisations."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.reparam import AutoReparam

import pyro_dgm as dgm
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.model.vectorize import Engine

X = torch.tensor([-1.5, -0.7, 0.2, 1.1, 1.9])


def summed(x):
    """A mixture whose assignments are enumerated."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc + 2.0 * k, 0.8), obs=x)


def summed_by_hand(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(x)):
        ends = dist.Normal(torch.stack([loc, loc + 2.0], -1), 0.8)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3])), ends), obs=x)


def chain(x):
    """A hidden Markov chain, enumerated step by step."""
    gap, k = pyro.sample("gap", dist.LogNormal(0.0, 1.0)), torch.zeros(())
    for t in pyro.markov(range(len(x))):
        k = pyro.sample(f"k{t}", dist.Bernoulli(0.2 + 0.6 * k), infer={"enumerate": "parallel"})
        pyro.sample(f"x{t}", dist.Normal(gap * k, 1.0), obs=x[t])


def chain_by_hand(gap, x):
    """The forward algorithm for one value of ``gap``, with the prior and the log-determinant of exp."""
    log_p = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()
    alpha = log_p[0] + dist.Normal(torch.stack([0.0 * gap, gap]), 1.0).log_prob(x[0])
    for t in range(1, len(x)):
        alpha = (alpha[:, None] + log_p).logsumexp(0) + dist.Normal(torch.stack([0.0 * gap, gap]), 1.0).log_prob(x[t])
    return alpha.logsumexp(0) + dist.LogNormal(0.0, 1.0).log_prob(gap) + gap.log()


def product(x, y):
    """x @ b: right for one draw, wrong for many in a plate."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def log_joint(model, *args):
    return LogJoint(dgm.AutoFlow(model).setup(*args), model, args, {})


def test_enumerated_sites_are_summed_out_for_many_draws_at_once():
    """Counting each assignment once (a sum instead of a logsumexp) or sampling it shows here."""
    u = torch.randn(7, 1)
    ours, by_hand = log_joint(summed, X), log_joint(summed_by_hand, X)
    assert ours.how == "plate"
    torch.testing.assert_close(ours(u), by_hand(u), rtol=1e-4, atol=1e-4)
    expected = torch.stack([chain_by_hand(v.exp()[0], X) for v in u])
    torch.testing.assert_close(log_joint(chain, X)(u), expected, rtol=1e-4, atol=1e-4)


def test_the_bound_over_enumerated_sites_is_that_of_pyro():
    guide = dgm.AutoFlow(summed, init_scale=0.5).setup(X)
    ours = torch.tensor([dgm.STL_ELBO(500).loss(summed, guide, X) for _ in range(8)]).mean()
    elbo = TraceEnum_ELBO(500, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.tensor([elbo.loss(summed, guide, X) for _ in range(8)]).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=0.15)


def test_a_fit_of_an_enumerated_model_gives_its_evidence():
    """The exact evidence is an integral over one latent; the log-likelihood of a row is summed over its class."""
    grid = torch.linspace(-8.0, 8.0, 2001)[:, None]
    evidence = log_joint(summed_by_hand, X)(grid).logsumexp(0).item() + math.log(16.0 / 2000)
    guide = dgm.AutoFlow(config_enumerate(summed))
    dgm.fit(dgm.STL_ELBO()(summed, guide), X, max_steps=150, seed=0, progress=False)
    idata = dgm.from_svi(summed, guide, X, num_samples=2000, seed=0, prior=10)
    loc, verdict = torch.as_tensor(idata["posterior"]["loc"].values[0]), dgm.khat(idata)
    ends = dist.Normal(torch.stack([loc, loc + 2.0], -1)[:, None], 0.8)
    by_hand = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3])), ends).log_prob(X)
    torch.testing.assert_close(
        torch.as_tensor(idata["log_likelihood"]["x"].values[0]).float(), by_hand, atol=1e-4, rtol=1e-4
    )
    assert verdict.log_evidence == pytest.approx(evidence, abs=0.02)
    assert verdict.status in ("good", "exact")


def test_a_matrix_product_runs_under_vmap_with_the_right_gradient():
    """In a plate x @ b mixes draws or fails; one by one it is slow. vmap gives the loop's values and gradients."""
    x, y = torch.randn(20, 3), torch.randn(20)
    many, u = log_joint(product, x, y), torch.randn(5, 3)
    assert many.how == "vmap"
    value, grad = many.value_and_grad(u)
    prior = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    torch.testing.assert_close(value, prior + dist.Normal(u @ x.T, 1.0).log_prob(y).sum(-1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grad, -u + (y - u @ x.T) @ x, rtol=1e-4, atol=1e-3)


def test_the_path_gradient_under_vmap_is_the_one_in_a_plate():
    """The same guide, seed and data; only the way the model is run differs."""

    def broadcast(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal((x * b).sum(-1), 1.0), obs=y)

    x, y = torch.randn(20, 3), torch.randn(20)
    guide, found = dgm.AutoFlow(broadcast).setup(x, y), []
    for model in (broadcast, product):
        elbo = dgm.STL_ELBO(64)
        elbo.loss(model, guide, x, y)  # settles how the model is run
        guide.zero_grad()
        torch.manual_seed(1)
        elbo(model, guide)(x, y).backward()
        found.append(guide._posterior.affine.grad.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-2)


def test_a_covariance_that_fails_for_some_draws_loses_those_draws_alone():
    """Without halving, one bad matrix of a batch ends the search (a crash) or removes all draws (-inf)."""

    def model():
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        root = torch.linalg.cholesky(s[..., None, None] * torch.eye(2))
        pyro.factor("f", root.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    guide = dgm.AutoFlow(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"s": torch.tensor(1.0)})).setup()
    value, grad = LogJoint(guide, model, (), {}).value_and_grad(torch.tensor([[1.0], [-1.0], [2.0], [-3.0]]))
    assert value.isfinite().tolist() == [True, False, True, False]
    torch.testing.assert_close(grad[:, 0], torch.tensor([0.0, 0.0, -1.5, 0.0]))


def test_a_reparameterised_model_keeps_its_own_sites_in_the_posterior():
    """Pyro leaves a masked Delta in the place of a reparameterised site; taken for data it would enter log_likelihood."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            theta = pyro.sample("theta", dist.Normal(mu, 0.5))
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    guide = dgm.AutoFlow(model, reparam=AutoReparam())
    for particles in (
        1,
        128,
    ):  # one particle takes the short way at once; without a check there the bound is silently wrong
        with pytest.raises(ValueError, match="pass guide.target"):
            dgm.STL_ELBO(particles)(model, guide)(X)
    dgm.fit(dgm.STL_ELBO()(guide.target, guide), X, max_steps=100, seed=0, progress=False)
    idata = dgm.from_svi(guide.target, guide, X, num_samples=2000, seed=0, prior=0, container="dict")
    groups, variance = idata["groups"], 1.0 / (1.0 + 5 / 1.25)
    assert list(groups["log_likelihood"]) == list(groups["observed_data"]) == ["x"]
    mean = variance * X.sum().item() / 1.25
    assert groups["posterior"]["mu"].mean() == pytest.approx(mean, abs=0.1 * variance**0.5)
    assert groups["posterior"]["theta"].shape == (1, 2000, 5)


def test_a_learned_centring_is_trained_with_the_guide():
    """The share of centring is a parameter of the model: it leaves one half where it began, and the posterior is right."""
    from pyro.infer.reparam import LocScaleReparam

    x = torch.randn(4, 200) + torch.tensor([-1.0, 0.0, 1.0, 2.0])[:, None]

    def model(x):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("group", 4, dim=-2):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            with pyro.plate("row", 200, dim=-1):
                pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    guide = dgm.AutoFlow(model, reparam={"theta": LocScaleReparam()})
    dgm.fit(dgm.STL_ELBO()(guide.target, guide), x, max_steps=150, seed=0, progress=False)
    assert (pyro.param("theta_centered") - 0.5).abs().max() > 1e-4  # it hardly matters: the start is right
    draws = dgm.from_svi(guide.target, guide, x, num_samples=1000, seed=0, prior=0, container="dict")["groups"][
        "posterior"
    ]
    mean = draws["theta"].mean((0, 1)).reshape(4)
    assert abs(mean - x.mean(1).numpy()).max() < 0.05


@pytest.fixture
def asked(monkeypatch):
    """How often it was asked how a model runs."""
    calls, find = [], Engine.find_how
    monkeypatch.setattr(Engine, "find_how", lambda engine, rows: calls.append(engine.model) or find(engine, rows))
    return calls


def test_how_a_model_runs_is_asked_once_for_a_fit_and_once_for_its_container(asked):
    guide = dgm.AutoFlow(summed_by_hand)
    dgm.fit(dgm.STL_ELBO(8)(summed_by_hand, guide), X, max_steps=2, progress=False, seed=0)
    assert len(asked) == 1  # of the bound, and of the warm start
    dgm.from_svi(summed_by_hand, guide, X, num_samples=50, prior=0, container="dict", seed=0)
    assert len(asked) == 2  # of the program, and of the exploration


def test_how_a_model_runs_is_asked_again_for_other_arguments_and_another_model(asked):
    guide = dgm.AutoFlow(summed).setup(X)
    joint = LogJoint(guide, summed, (X,), {})
    assert LogJoint.known(guide, summed, (X,), {}).how == joint.how and len(asked) == 1
    for model, x in ((summed, X.clone()), (summed_by_hand, X)):
        joint = LogJoint(guide, summed, (X,), {})
        before = len(asked)
        assert LogJoint.known(guide, model, (x,), {}).how == joint.how and len(asked) == before + 1
