"""Posteriors that follow a chain: exact where the model is linear and normal, found by the density, and judged with their chain."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_dgm as dgm
from pyro_dgm.guides import chains
from pyro_dgm.guides.chains import Learned
from pyro_dgm.model.chains import BandedChain, BlockFactor
from pyro_dgm.model.log_joint import LogJoint
from tests.benchmarks.hierarchies import hierarchy
from tests.benchmarks.series import drawn_level, drawn_volatility, exact_level, local_level, vector, volatility


def looped_level(y):
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    step = pyro.sample("step", dist.HalfNormal(1.0))
    level = 0.0
    for t in pyro.markov(range(len(y))):
        level = pyro.sample(f"level_{t}", dist.Normal(level, step))
        pyro.sample(f"y_{t}", dist.Normal(level, noise), obs=y[t])


def summed_level(y):
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    step = pyro.sample("step", dist.HalfNormal(1.0))
    e = pyro.sample("e", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    pyro.sample("y", dist.Normal(step[..., None] * e.cumsum(-1), noise[..., None]).to_event(1), obs=y)


def trend(y):
    """A level whose slope walks."""
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    step = pyro.sample("step", dist.HalfNormal(1.0).expand([2]).to_event(1))
    level, slope = vector("level", len(y)), vector("slope", len(y))
    pyro.factor("start", dist.Normal(0.0, 1.0).log_prob(level[..., 0]) + dist.Normal(0.0, 1.0).log_prob(slope[..., 0]))
    rise = level.diff(dim=-1) - slope[..., :-1]
    pyro.factor("walk", dist.Normal(0.0, step[..., :1]).log_prob(rise).sum(-1))
    pyro.factor("bend", dist.Normal(0.0, step[..., 1:]).log_prob(slope.diff(dim=-1)).sum(-1))
    pyro.sample("y", dist.Normal(level, noise[..., None]).to_event(1), obs=y)


def autoregression(y, order=1, noise=0.5):
    """Of a state that is seen with noise."""
    push = pyro.sample("push", dist.HalfNormal(1.0))
    keep = pyro.sample("keep", dist.Uniform(-1.0, 1.0))
    x = vector("x", len(y))
    before = keep[..., None] * (x[..., :-order] if order == 1 else 0.7 * x[..., 1:-1] + 0.3 * x[..., :-2])
    pyro.factor("start", dist.Normal(0.0, 2.0).log_prob(x[..., :order]).sum(-1))
    pyro.factor("chain", dist.Normal(before, push[..., None]).log_prob(x[..., order:]).sum(-1))
    pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def started(model, *args, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = dgm.AutoFlow(model, **options)
    guide.warm_start(*args)
    return guide


def judged(model, guide, y, draws=1000):
    return dgm.from_svi(
        model, guide, y, seed=0, prior=0, num_samples=draws, log_likelihood=False, posterior_predictive=False
    )


def weighted(idata, name):
    """Mean and sd of the logarithm of a site, by the weights."""
    weight = torch.as_tensor(idata.sample_stats["log_weight"].values.ravel()).softmax(0)
    log = torch.as_tensor(idata.posterior[name].values.ravel()).double().log()
    mean = weight @ log
    return float(mean), float((weight @ (log - mean).square()).sqrt())


# --- Matrices ---


@pytest.mark.parametrize(("width", "count"), [(1, 1), (1, 7), (1, 8), (2, 5), (3, 6)])
def test_factors_are_those_of_dense_matrices(width, count):
    """Planted: the last odd block's right neighbour left out where there is one; the solution is then off by .1."""
    torch.manual_seed(0)
    root = torch.randn(3, count, width, width).double()
    diagonal = root @ root.mT + 4.0 * torch.eye(width).double()
    lower = 0.5 * torch.randn(3, count - 1, width, width).double()
    dense = torch.stack([torch.block_diag(*d) for d in diagonal])
    for k in range(count - 1):
        here, there = slice(k * width, (k + 1) * width), slice((k + 1) * width, (k + 2) * width)
        dense[:, there, here], dense[:, here, there] = lower[:, k], lower[:, k].mT
    factor = BlockFactor(diagonal, lower)
    b = torch.randn(3, count, width).double()
    assert torch.allclose(factor.log_det, 0.5 * torch.logdet(dense))
    assert torch.allclose(factor.solve(b).flatten(1), torch.linalg.solve(dense, b.flatten(1)))
    assert torch.allclose(factor.whitened(factor.up(b)), b)
    drawn = factor.up(b).flatten(1)
    assert torch.allclose((drawn[:, None] @ dense @ drawn[..., None]).flatten(), b.square().sum((1, 2)))
    spread = chains.deviations(diagonal, lower).flatten(1)
    assert torch.allclose(spread, torch.linalg.inv(dense).diagonal(dim1=1, dim2=2).sqrt())


# --- What is a chain ---


@pytest.mark.parametrize(
    ("model", "width", "stride", "normal"),
    [
        (local_level, 1, 0, True),
        (summed_level, 1, 1, True),
        (looped_level, 1, 0, True),
        (trend, 2, 0, True),
        (lambda y: autoregression(y, order=2), 2, 0, True),
        (volatility, 1, 0, False),
    ],
    ids=["vector", "sums", "loop", "two states", "second order", "volatility"],
)
def test_chains_are_found_in_the_density(model, width, stride, normal):
    y = drawn_level(60, 0)
    guide = dgm.AutoFlow(model).setup(y)
    chain = guide.factors_of(LogJoint(guide, model, (y,), {}))
    assert guide.follows_chain and not guide.follows_plates
    assert (chain.inside.shape[1], chain.stride, chain.normal) == (width, stride, normal)
    assert len(chain.free) + chain.size == guide.latent_dim


def test_what_is_no_chain_is_not_followed():
    x = torch.randn(80, 60)

    def regression(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([60]).to_event(1))
        pyro.sample("y", dist.Normal((x @ b[..., None])[..., 0], scale[..., None]).to_event(1), obs=y)

    y = torch.randn(80)
    guide = dgm.AutoFlow(regression).setup(y)
    assert not guide.follows_chain
    with pytest.raises(ValueError, match="structure='chain', but its latents hang together more than those of a chain"):
        dgm.AutoFlow(regression, structure="chain").setup(y)
    with pytest.raises(ValueError, match="no latents that follow one another"):
        dgm.AutoFlow(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), structure="chain").setup()
    assert not dgm.AutoFlow(local_level, structure="joint").setup(y).follows_chain
    assert dgm.AutoFlow(local_level, structure="chain").setup(y[:30]).follows_chain
    sigma = torch.ones(60)
    assert dgm.AutoFlow(hierarchy()).setup(sigma, y[:60]).follows_plates


# --- Linear normal chains are exact ---


@pytest.mark.parametrize("model", [local_level, summed_level], ids=["centred", "sums"])
def test_the_marginal_of_a_local_level_is_that_of_the_kalman_filter(model):
    """Planted: half of the log determinant; gradients by the precision left out are off by 30."""
    y = drawn_level(60, 0)
    guide = dgm.AutoFlow(model).setup(y)
    chain = guide.factors_of(LogJoint(guide, model, (y,), {}))
    g = torch.tensor([[0.1, -1.0], [-0.2, -0.5]]).double().requires_grad_()
    found = guide.plated.marginal(chain, g)
    expected = exact_level(y.double(), g)
    assert torch.allclose(found, expected, atol=1e-6)
    gradients = [torch.autograd.grad(value.sum(), g)[0] for value in (found, expected)]
    assert torch.allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize("steps", [60, 2000])
def test_a_local_level_is_right(steps):
    """Planted: globals whose whitening is 1.3 times as wide; the status is then not good."""
    y = drawn_level(steps, 0)
    guide = started(local_level, y)
    own = guide.plated
    axis = torch.linspace(-5.0, 5.0, 33).double()
    w = torch.cartesian_prod(axis, axis)
    g = own.outer.loc.double() + w @ own.outer.scale_tril.double().mT
    log_p = exact_level(y.double(), g)
    weight = log_p.softmax(0)
    mean = weight @ g
    sd = (weight @ (g - mean).square()).sqrt()
    cell = float(axis[1] - axis[0]) ** 2 * float(own.outer.scale_tril.diagonal().prod())
    idata = judged(local_level, guide, y)
    verdict = dgm.khat(idata)
    assert abs(verdict.log_evidence - float(log_p.logsumexp(0)) - math.log(cell)) < 0.03
    assert verdict.gap < 0.05 and (steps == 60 or verdict.status == "good")
    for k, name in enumerate(("noise", "step")):
        found = weighted(idata, name)
        assert abs(found[0] - float(mean[k])) < 0.15 * float(sd[k])
        assert abs(math.log(found[1] / float(sd[k]))) < 0.15


def test_the_levels_are_right():
    """Planted: draws of the chain by the transposed factor; standard deviations are then off by a third."""
    y = drawn_level(60, 0)
    guide = started(local_level, y)
    levels = torch.as_tensor(judged(local_level, guide, y, 2000).posterior["level"].values).reshape(-1, 60).double()
    g = guide.plated.outer().sample((400,)).double().exp()
    walk = torch.minimum(*torch.meshgrid(*[torch.arange(1.0, 61.0)] * 2, indexing="ij")).double()
    prior = g[:, 1, None, None].square() * walk
    gain = torch.linalg.solve(prior + g[:, 0, None, None].square() * torch.eye(60), prior).mT
    mean = (gain @ y.double()[:, None])[..., 0]
    variance = (prior - gain @ prior).diagonal(dim1=1, dim2=2).mean(0) + mean.var(0)
    assert float(((levels.mean(0) - mean.mean(0)) / variance.sqrt()).abs().max()) < 0.15
    assert float((levels.std(0) / variance.sqrt()).log().abs().max()) < 0.12


def test_an_autoregression_with_noise_is_right():
    """Planted: the constant of the normal law left out; the evidence is then off by 73 nats."""
    torch.manual_seed(1)
    x = [torch.zeros(())]
    for _ in range(79):
        x.append(0.8 * x[-1] + 0.6 * torch.randn(()))
    y = torch.stack(x) + 0.5 * torch.randn(80)
    guide = started(autoregression, y)
    chain = guide.factors_of(LogJoint(guide, autoregression, (y,), {}))
    g = guide.plated.outer().sample((4,)).double()
    with torch.no_grad():
        found = guide.plated.inner(chain, g, 2)[1]
    for (push, keep), value in zip(g, found.T, strict=True):
        push, keep = push.exp(), 2.0 * keep.sigmoid() - 1.0
        operator = torch.eye(80).double() - keep * torch.diag(torch.ones(79), -1).double()
        scale = torch.cat([torch.tensor([2.0]), push.expand(79)]).double()
        root = torch.linalg.solve(operator, torch.diag(scale))
        law = dist.MultivariateNormal(torch.zeros(80).double(), root @ root.T + 0.25 * torch.eye(80))
        prior = dist.HalfNormal(1.0).log_prob(push) + push.log() + math.log(0.5) + torch.log(0.5 * (1 - keep**2))
        assert torch.allclose(value, law.log_prob(y.double()) + prior, atol=1e-5)
    pyro.clear_param_store()
    guide = dgm.AutoFlow(autoregression)
    dgm.fit(dgm.STL_ELBO()(autoregression, guide), (y,), seed=0, progress=False)
    verdict = dgm.khat(judged(autoregression, guide, y, 4000))
    assert verdict.status == "good", str(verdict)


# --- Other chains ---


def test_the_chain_of_a_stochastic_volatility_is_integrated_out():
    """Two estimates of the same integrals agree. Planted: the mode in the place of the best law; the variance is then .7, not .14."""
    y = drawn_volatility(100, 0)
    guide = started(volatility, y)
    chain = guide.factors_of(LogJoint(guide, volatility, (y,), {}))
    g = guide.plated.outer().sample((8,)).double()
    with torch.no_grad():
        few = guide.plated.inner(chain, g, 256)[1]
        many = guide.plated.inner(chain, g, 4096)[1]
    one, other = (r.logsumexp(0) - math.log(len(r)) for r in (few, many))
    assert float((one - other).abs().mean()) < 0.02
    assert float(few.var(0).mean()) < 0.3
    idata = judged(volatility, guide, y)
    assert dgm.khat(idata).log_evidence_error < 0.1


# --- Verdicts ---


@pytest.mark.parametrize("fault", ["globals too narrow", "globals shifted", "chain too narrow", "chain shifted"])
def test_faults_are_seen(fault, monkeypatch):
    y = drawn_level(60, 0)
    guide = started(local_level, y)
    right = chains.found_laws

    def wrong(chain, g, **options):
        laws, spread = right(chain, g, **options)
        if fault == "chain too narrow":
            return laws._replace(diagonal=1.1 * laws.diagonal), spread
        return laws._replace(mean=laws.mean + 0.5), spread  # a shift by .1 is made up for by the weights of 128 draws

    with torch.no_grad():
        if fault == "globals too narrow":
            guide.plated.affine[1] -= 0.7
        if fault == "globals shifted":
            guide.plated.affine[0, 0] += 0.7
    if fault.startswith("chain"):
        monkeypatch.setattr(chains, "found_laws", wrong)
    verdict = dgm.khat(judged(local_level, guide, y, 4000))
    assert verdict.status in ("usable", "bad"), str(verdict)


def test_what_is_learned_of_a_density_is_that():
    """Planted: the normal law left out, far from all points it is then level."""
    torch.manual_seed(0)

    def density(w):
        return -0.5 * w.square().sum(-1) + 0.1 * w[:, 0] ** 3 / 6 + 3.0

    w = 1.5 * torch.randn(200, 2).double()
    tril = torch.tensor([[2.0, 0.0], [0.5, 1.0]])
    learned = Learned(torch.tensor([1.0, -1.0]), tril, w, density(w))
    new = torch.randn(100, 2).double()
    g = new @ tril.double().mT + torch.tensor([1.0, -1.0]).double()
    assert float((learned(g) - density(new)).abs().max()) < 0.02
    far = torch.tensor([[60.0, 60.0]]).double()
    assert float(learned(far @ tril.double().mT + learned.loc)) < -1000.0


# --- As any guide ---


def test_fit_trains_the_globals():
    y = drawn_level(60, 0)
    pyro.clear_param_store()
    guide = dgm.AutoFlow(local_level)
    dgm.fit(dgm.STL_ELBO()(local_level, guide), (y,), seed=0, progress=False, max_steps=200)
    verdict = dgm.khat(judged(local_level, guide, y, 4000))
    assert guide.follows_chain and verdict.gap < 0.02, str(verdict)


def test_states_copies_and_pickles():
    y = drawn_level(60, 0)
    guide = started(local_level, y)
    other = dgm.AutoFlow(local_level).setup(y)
    other.load_state_dict(guide.state_dict())
    u = guide.get_posterior(y).sample((3,))
    expected = guide.get_posterior(y).log_prob(u)
    for same in (other, copy.deepcopy(guide)):
        assert torch.allclose(same.get_posterior(y).log_prob(u), expected, atol=1e-3)
    assert other.quantiles([0.5], y)["level"].shape == (1, 60)
    with pytest.raises(ValueError, match="which a pickled guide has lost"):
        pickle.loads(pickle.dumps(guide)).get_posterior(y).log_prob(u)


def test_stock_svi_trains_the_globals():
    """Planted: the model run within the plate of the particles, which Pyro refuses."""
    y = drawn_level(60, 0)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = dgm.AutoFlow(local_level, init_scale=0.3)
    svi = SVI(local_level, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(8, vectorize_particles=True))
    losses = [svi.step(y) for _ in range(25)]
    assert 98.0 < sum(losses[-5:]) / 5 < 104.0 < losses[0]
    pyro.clear_param_store()


def test_draws_and_densities_agree():
    """Planted: the log determinant of the chain left out of the transform."""
    y = drawn_level(60, 0)
    guide = started(local_level, y)
    own = guide.plated
    posterior = guide.get_posterior(y)
    u, scored = posterior.rsample_and_log_prob((5,))
    assert torch.allclose(posterior.log_prob(u), scored, atol=2e-2)
    log_joint = LogJoint(guide, local_level, (y,), {})
    chain = guide.factors_of(log_joint)
    g, _ = chain.split(u)
    own.learned = None
    with torch.no_grad():
        expected = log_joint(u) - own.marginal(chain, g.double()) + own.outer().log_prob(g)
    assert torch.allclose(scored.double(), expected.double(), atol=2e-2)


def test_models_that_run_one_by_one_are_refused():
    y = drawn_level(60, 0)
    guide = dgm.AutoFlow(local_level).setup(y)
    with pytest.raises(ValueError, match="does not run in a plate"):
        BandedChain(LogJoint(guide, local_level, (y,), {}, how="loop"))


def test_the_sites_are_known():
    guide = dgm.AutoFlow(trend).setup(drawn_level(40, 0))
    assert guide.plated.sites == ("level", "slope")
