"""Posteriors that follow plates: exact where the model is normal, linear in the elements, and judged by element."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

import pyro_dgm as dgm
from pyro_dgm.model.elements import Factors, NotFactoredError, elements_of
from pyro_dgm.model.log_joint import LogJoint
from tests.benchmarks.hierarchies import drawn, hierarchy, likelihood

J = 60
MU, LOG_TAU = torch.meshgrid(torch.linspace(-1.0, 3.0, 161), torch.linspace(-2.5, 1.5, 161), indexing="ij")


def data(seed=1, groups=J):
    generator = torch.Generator().manual_seed(seed)
    sigma = 0.5 + torch.rand(groups, generator=generator)
    theta = 1.0 + 0.7 * torch.randn(groups, generator=generator)
    return sigma, theta + sigma * torch.randn(groups, generator=generator)


def exact(log_likelihood):
    """Means and sds of mu and log tau, and the log evidence, on a grid; ``log_likelihood(mu, tau)`` has no elements left."""
    tau = LOG_TAU.exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(MU) + dist.HalfCauchy(2.0).log_prob(tau) + LOG_TAU
    log_p = (log_p + log_likelihood(MU, tau)).double()
    weight = log_p.flatten().softmax(0)
    points = torch.stack([MU.flatten(), LOG_TAU.flatten()], -1).double()
    mean = weight @ points
    cell = float((MU[1, 0] - MU[0, 0]) * (LOG_TAU[0, 1] - LOG_TAU[0, 0]))
    return mean, (weight @ (points - mean).square()).sqrt(), float(log_p.flatten().logsumexp(0)) + math.log(cell)


def exact_normal(sigma, y):
    def log_likelihood(mu, tau):
        scale = (tau[..., None].square() + sigma.square()).sqrt()
        return dist.Normal(mu[..., None], scale).log_prob(y).sum(-1)

    return exact(log_likelihood)


def started(model, *args, **options):
    pyro.set_rng_seed(0)
    guide = dgm.AutoFlow(model, **options)
    guide.warm_start(*args)
    return guide


@pytest.mark.parametrize("centred", [True, False])
def test_a_normal_hierarchy_is_right_before_the_first_step(centred):
    """Planted: responses that are left in the old units when the globals move; the evidence is then off by 2 nats."""
    sigma, y = data()
    model = hierarchy(centred=centred)
    guide = started(model, sigma, y)
    mean, sd, evidence = exact_normal(sigma, y)
    assert guide.follows_plates
    outer = guide.plated.outer
    assert bool(((outer.loc - mean).abs() < 0.15 * sd).all())  # the best normal law of a skewed posterior
    idata = dgm.from_svi(model, guide, sigma, y, seed=0, prior=0, num_samples=2000)
    verdict = dgm.khat(idata)
    assert abs(verdict.log_evidence - evidence) < 4 * verdict.log_evidence_error + 0.005
    weight = torch.as_tensor(idata.sample_stats["log_weight"].values.ravel()).softmax(0)
    mu = torch.as_tensor(idata.posterior["mu"].values.ravel()).double()
    assert abs(float(weight @ mu - mean[0])) < 0.1 * float(sd[0])
    assert verdict.rows is not None and verdict.rows.plate == "group" and verdict.rows.fine == 1.0


def test_the_elements_given_the_globals_are_exact():
    """Planted: the answer to the globals left out; means are then off by half a standard deviation."""
    sigma, y = data()
    guide = started(hierarchy(), sigma, y)
    own = guide.plated
    g = own.outer().sample((200,))
    with torch.no_grad():
        law = own.groups[0].given(own.white(g))
    tau = g[:, 1:].exp()
    precision = 1.0 + (tau / sigma).square()
    mean = (tau / sigma) * (y - g[:, :1]) / sigma / precision  # of (theta - mu) / tau
    assert float(((law.mean[..., 0] - mean) * precision.sqrt()).abs().mean()) < 0.02
    assert float((law.tril[..., 0, 0] / precision.sqrt()).log().abs().mean()) < 0.02


def test_counts_with_skewed_elements_are_integrated_out():
    """Planted: one node in the place of nine, which is the bound without integration; the mean of log tau is then .3 sd off."""
    exposure, y = data(3, 200)
    y = torch.poisson(exposure * y.exp(), generator=torch.Generator().manual_seed(0))
    model = hierarchy("poisson")
    guide = started(model, exposure, y)
    own = guide.plated
    factors = guide.factors_of(LogJoint(guide, model, (exposure, y), {}))
    g = own.outer().sample((16,))
    rows = [torch.linspace(-8.0, 8.0, 801)[:, None] * tau + mu for mu, tau in zip(g[:, 0], g[:, 1].exp(), strict=True)]
    step = 16.0 / 800
    with torch.no_grad():
        marginal = own.marginal(factors, g)
    for theta, (mu, log_tau), found in zip(rows, g, marginal, strict=True):
        each = likelihood("poisson", theta, exposure).log_prob(y)
        each = each + dist.Normal(0.0, 1.0).log_prob((theta - mu) / log_tau.exp())
        integral = float((each.double().logsumexp(0) + math.log(step)).sum())
        prior = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(2.0).log_prob(log_tau.exp()) + log_tau
        assert abs(float(found) - integral - float(prior)) < 0.02


def test_slopes_with_a_learned_correlation():
    generator = torch.Generator().manual_seed(2)
    group = torch.arange(40).repeat_interleave(6)
    x = torch.randn(240, generator=generator)
    tril = torch.tensor([[0.8, 0.0], [-0.2, 0.4]])
    b = torch.tensor([1.0, -0.5]) + torch.randn(40, 2, generator=generator) @ tril.T
    y = b[group, 0] + b[group, 1] * x + 0.6 * torch.randn(240, generator=generator)

    def model(group, x, y):
        m = pyro.sample("m", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(2.0).expand([2]).to_event(1))
        chol = pyro.sample("chol", dist.LKJCholesky(2, 2.0))
        with pyro.plate("group", 40):
            beta = pyro.sample("beta", dist.MultivariateNormal(m, scale_tril=s[..., :, None] * chol))
        with pyro.plate("data", 240):
            own = beta[..., group, :]
            pyro.sample("y", dist.Normal(own[..., 0] + own[..., 1] * x, 0.6), obs=y)

    guide = started(model, group, x, y)
    assert guide.follows_plates and guide.plated.groups[0].index.shape == (40, 2)
    verdict = dgm.khat(dgm.from_svi(model, guide, group, x, y, seed=0, prior=0, posterior_predictive=False))
    assert verdict.gap < 0.2 and verdict.ess > 0.8 * verdict.draws and verdict.rows.fine > 0.9
    posterior = guide.draws(500, group, x, y)["beta"].mean(0)
    assert float((posterior - b).abs().mean()) < 0.3


def test_densities_and_draws_agree():
    """Planted: the determinant of one element left out."""
    sigma, y = data(groups=30)
    guide = started(hierarchy(), sigma, y, structure="plates")
    q = guide.get_posterior(sigma, y)
    u, log_q = q.rsample_and_log_prob((5,))
    assert torch.allclose(q.log_prob(u), log_q, atol=2e-3)
    v = torch.randn(32, dtype=torch.float64).float()
    built = guide.plated.build(None)
    placed = guide.plated.bijection(built)
    jacobian = torch.autograd.functional.jacobian(placed, v).double()
    assert abs(float(torch.linalg.slogdet(jacobian)[1]) - float(placed.call_and_ladj(v)[1])) < 1e-3


def test_before_a_start_it_is_the_diagonal_normal():
    sigma, y = data()
    guide = dgm.AutoFlow(hierarchy(), init_scale=0.2).setup(sigma, y)
    u = guide.get_posterior(sigma, y).sample((4000,))
    assert torch.allclose(u.mean(0), guide._init_loc(), atol=0.02)
    assert torch.allclose(u.std(0), torch.tensor(0.2), atol=0.02)


# --- Which models have elements ---


def coupled(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("group", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
    middle = theta.mean(-1, keepdim=True) if theta.dim() else theta
    with pyro.plate("data", len(sigma)):
        pyro.sample("y", dist.Normal(theta - middle, sigma), obs=y)


def nested(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("group", 20, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("item", 3, dim=-1):
            phi = pyro.sample("phi", dist.Normal(theta, 0.5))
            pyro.sample("y", dist.Normal(phi, sigma.reshape(20, 3)), obs=y.reshape(20, 3))


def crossed(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", 30):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with pyro.plate("column", 30):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(sigma)):
        i = torch.arange(len(sigma))
        pyro.sample("y", dist.Normal(a[..., i % 30] + b[..., (7 * i) // 2 % 30], sigma), obs=y)


def regression(sigma, y):
    """Coefficients, which all data depend on."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(J), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    x = torch.randn(len(y), J, generator=torch.Generator().manual_seed(0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma * scale), obs=y)


@pytest.mark.parametrize("model", [coupled, regression])
def test_where_elements_hang_together_there_is_one_flow(model):
    """Planted: owners by one half of each pair of runs, without the other; both models then count as products."""
    sigma, y = data()
    assert not dgm.AutoFlow(model).setup(sigma, y).follows_plates
    with pytest.raises(ValueError, match="structure='plates', but a term of its density depends on several elements"):
        dgm.AutoFlow(model, structure="plates").setup(sigma, y)


def test_of_crossed_plates_one_is_followed():
    """The other's latents are globals. Planted: both kept, or none; there is then no guide that follows plates."""
    sigma, y = data()
    guide = started(crossed, sigma, y)
    assert [group.plate for group in guide.plated.groups] == ["row"] and guide.plated.size == 31
    i = torch.arange(J)
    same = (i[:, None] % 30 == i % 30).float() + ((7 * i[:, None]) // 2 % 30 == (7 * i) // 2 % 30).float()
    exact = dist.MultivariateNormal(torch.zeros(J), sigma.square().diag() + same + 25.0).log_prob(y)
    verdict = dgm.khat(dgm.from_svi(crossed, guide, sigma, y, seed=0, prior=0))
    assert abs(verdict.log_evidence - float(exact)) < 0.05 and verdict.status in ("good", "exact")


def vectors(sigma, y):
    """The hierarchy without a plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))[..., None]
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))[..., None]
    theta = pyro.sample("theta", dist.Normal(mu.expand(*mu.shape[:-1], J), tau).to_event(1))
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def log_normal_vectors(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))[..., None]
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))[..., None]
    theta = pyro.sample("theta", dist.LogNormal(mu.expand(*mu.shape[:-1], J), tau).to_event(1))
    pyro.sample("y", dist.LogNormal(theta.log(), sigma).to_event(1), obs=y.exp())


@pytest.mark.parametrize("model", [vectors, log_normal_vectors])
def test_entries_of_vectors_are_followed_as_plates_are(model):
    """Planted: densities, or log-determinants, that are summed over the entries of a vector; no element is then found."""
    sigma, y = data()
    guide = started(model, sigma, y)
    verdict = dgm.khat(dgm.from_svi(model, guide, sigma, y, seed=0, prior=0, num_samples=2000))
    evidence = exact_normal(sigma, y)[2] - (float(y.sum()) if model is log_normal_vectors else 0.0)
    assert abs(verdict.log_evidence - evidence) < 4 * verdict.log_evidence_error + 0.005
    assert verdict.rows.plate == "entries of theta" and verdict.rows.total == J


def test_a_funnel_of_a_hundred_dimensions_needs_no_flow():
    """Planted: plates alone are followed; 2,100 steps of a flow then leave a gap of .08 nats."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(99), (v / 2).exp()[..., None]).to_event(1))

    verdict = dgm.khat(dgm.from_svi(model, started(model), seed=0, prior=0))
    assert verdict.status == "good" and abs(verdict.log_evidence) < 0.02


def test_nested_latents_belong_to_the_outer_element():
    sigma, y = data()
    guide = started(nested, sigma, y)
    assert guide.plated.groups[0].index.shape == (20, 4)
    verdict = dgm.khat(dgm.from_svi(nested, guide, sigma, y, seed=0, prior=0))
    mean, variance = y.reshape(20, 3), sigma.reshape(20, 3).square() + 0.25
    within = torch.diag_embed(variance) + 1.0
    whole = torch.block_diag(*within) + 25.0
    evidence = float(dist.MultivariateNormal(torch.zeros(60), whole).log_prob(mean.reshape(-1)))
    assert abs(verdict.log_evidence - evidence) < 0.05 and verdict.status in ("good", "exact")


def test_a_model_that_runs_by_vmap_is_followed():
    """Which a newcomer's does, who writes ``s[0]``. Planted: plates asked for in draws' plates only; there is then one flow."""
    sigma, y = data()

    def model(sigma, y):
        s = pyro.sample("s", dist.HalfNormal(2.0).expand([2]).to_event(1))
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("group", J):
            theta = pyro.sample("theta", dist.Normal(mu, s[0]))
            pyro.sample("y", dist.Normal(theta, sigma * s[1]), obs=y)

    pyro.clear_param_store()
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), (sigma, y), seed=0, progress=False, max_steps=100)
    assert guide.follows_plates
    verdict = dgm.khat(dgm.from_svi(model, guide, sigma, y, seed=0, prior=0))
    joint = LogJoint(guide, model, (sigma, y), {})
    u = guide.get_posterior(sigma, y).sample((3,))
    rest, local = guide.factors_of(joint)(u)
    assert joint.how == "vmap" and torch.allclose(rest + local.sum(-1), joint(u), atol=1e-3)
    assert verdict.gap < 0.2 and verdict.rows.fine > 0.9


def test_each_term_goes_to_its_element():
    sigma, y = data()
    model = hierarchy()
    guide = dgm.AutoFlow(model).setup(sigma, y)
    joint = LogJoint(guide, model, (sigma, y), {})
    factors = Factors(joint, elements_of(guide.prototype_trace, guide.coordinates))
    u = torch.randn(4, 2 + J)
    rest, local = factors(u)
    assert torch.allclose(rest + local.sum(-1), joint(u), atol=1e-3)
    moved = u.clone()
    moved[:, 2 + 7] += 1.0
    changed = (factors(moved)[1] - local).abs() > 1e-6
    assert changed[:, 7].all() and changed.sum() == 4


def test_few_latents_and_a_wish_for_one_flow_have_one():
    sigma, y = data(groups=8)
    assert not dgm.AutoFlow(hierarchy()).setup(sigma, y).follows_plates
    assert dgm.AutoFlow(hierarchy(), structure="plates").setup(sigma, y).follows_plates
    assert not dgm.AutoFlow(hierarchy(), structure="joint").setup(*data()).follows_plates
    with pytest.raises(ValueError, match="structure='plate', expected 'auto', 'plates', 'chain' or 'joint'"):
        dgm.AutoFlow(hierarchy(), structure="plate")
    with pytest.raises(ValueError, match="no plate of 8 or more elements holds latents"):
        dgm.AutoFlow(hierarchy(), structure="plates").setup(*data(groups=5))
    with pytest.raises(NotFactoredError, match="does not run in a plate"):
        guide = dgm.AutoFlow(hierarchy(), structure="plates").setup(sigma, y)
        joint = LogJoint(guide, guide.target, (sigma, y), {}, how="loop")
        Factors(joint, elements_of(guide.prototype_trace, guide.coordinates))


# --- Verdicts ---


@pytest.mark.parametrize(
    "fault", ["globals too narrow", "globals shifted", "an element shifted", "elements too narrow"]
)
def test_faults_are_seen(fault):
    sigma, y = data()
    model = hierarchy()
    guide = started(model, sigma, y)
    own, group = guide.plated, guide.plated.groups[0]
    with torch.no_grad():
        if fault == "globals too narrow":
            own.affine[1] -= 0.7
        if fault == "globals shifted":
            own.affine[0, 0] += 0.7
        if fault == "an element shifted":
            group.shift[:6, 0, 0] += 8.0
        if fault == "elements too narrow":
            group.log_root[..., 0] += 1.5
    verdict = dgm.khat(dgm.from_svi(model, guide, sigma, y, seed=0, prior=0))
    assert verdict.status in ("usable", "bad"), str(verdict)


def test_an_unfitted_guide_is_told_so():
    sigma, y = data()
    guide = dgm.AutoFlow(hierarchy()).setup(sigma, y)
    verdict = dgm.khat(dgm.from_svi(hierarchy(), guide, sigma, y, seed=0, prior=0))
    assert verdict.status == "bad" or "never fitted" in str(verdict)


# --- As any guide ---


def test_fit_trains_the_globals_and_ends():
    sigma, y = data()
    model = hierarchy()
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model)
    history = dgm.fit(dgm.STL_ELBO()(model, guide), (sigma, y), seed=0, progress=False, max_steps=100)
    verdict = dgm.khat(dgm.from_svi(model, guide, sigma, y, seed=0, prior=0))
    assert guide.follows_plates and verdict.gap < 0.03
    assert abs(min(history.loss[-10:]) + exact_normal(sigma, y)[2]) < 0.2


def test_stock_svi_trains_the_elements_too():
    sigma, y = data()
    model = hierarchy()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = dgm.AutoFlow(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(16, vectorize_particles=True))
    losses = [svi.step(sigma, y) for _ in range(300)]
    assert sum(losses[-20:]) / 20 < -exact_normal(sigma, y)[2] + 15.0 < losses[0]
    pyro.clear_param_store()


def test_states_copies_and_pickles():
    sigma, y = data()
    model = hierarchy()
    guide = started(model, sigma, y)
    other = dgm.AutoFlow(model).setup(sigma, y)
    other.load_state_dict(guide.state_dict())
    u = guide.get_posterior(sigma, y).sample((3,))
    expected = guide.get_posterior(sigma, y).log_prob(u)
    for same in (other, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert torch.equal(same.get_posterior(sigma, y).log_prob(u), expected)
    assert other.quantiles([0.5], sigma, y)["theta"].shape == (1, J)


def test_long_chains_run_in_its_coordinates():
    sigma, y = data(groups=12)
    model = hierarchy()
    guide = started(model, sigma, y, structure="plates")
    idata = dgm.neutra(model, guide, sigma, y, num_samples=150, warmup_steps=50, num_chains=1, seed=0, progress=False)
    mean, sd, _ = exact_normal(sigma, y)
    assert abs(float(idata.posterior["mu"].values.mean()) - float(mean[0])) < 0.4 * float(sd[0])


def test_double_precision():
    sigma, y = (t.double() for t in data())

    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 5.0))
        with pyro.plate("group", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    guide = started(model, sigma, y)
    assert guide.draws(3, sigma, y)["theta"].dtype == torch.float64
    verdict = dgm.khat(dgm.from_svi(model, guide, sigma, y, seed=0, prior=0))
    scale = torch.diag(1.0 + sigma.square()) + 25.0
    evidence = float(dist.MultivariateNormal(torch.zeros(J).double(), scale).log_prob(y))
    assert abs(verdict.log_evidence - evidence) < 0.01


def test_where_elements_are_not_found_near_there_is_one_flow():
    """Gamma rates whose logarithms have prior draws at -1e3. Planted: without the way back the first loss is NaN."""
    y = (3.0 * torch.randn(J, generator=torch.Generator().manual_seed(0)).abs()).round()

    def model(y):
        shape = pyro.sample("shape", dist.LogNormal(0.0, 1.0))
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("group", J):
            pyro.sample("y", dist.Poisson(pyro.sample("r", dist.Gamma(shape, rate))), obs=y)

    pyro.clear_param_store()
    guide = dgm.AutoFlow(model)
    history = dgm.fit(dgm.STL_ELBO()(model, guide), (y,), seed=0, progress=False, max_steps=20)
    assert math.isfinite(history.loss[-1])
    assert guide.quantiles([0.5], y)["r"].shape == (1, J)
    other = dgm.AutoFlow(model).setup(y)
    other.load_state_dict(guide.state_dict())
    u = guide.get_posterior(y).sample((3,))
    assert torch.equal(other.get_posterior(y).log_prob(u), guide.get_posterior(y).log_prob(u))


def test_a_few_far_draws_of_the_start_do_not_give_the_plates_up():
    """Trials that leave tau open to zero. Planted: the variance of the start's log weights, which three of 256 draws make 40."""
    known, y = drawn("binomial", 200, seed=200)
    guide = started(hierarchy("binomial"), known, y)
    assert guide.follows_plates


MASKED = {"sizes of the mask": {"mask": torch.ones(2, 12, dtype=torch.bool)}, "booleans": {"y": torch.ones(3, 12) > 0}}


def masked(y, mask=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", y.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("row", len(y), dim=-2), poutine.mask(mask=True if mask is None else mask):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.mark.parametrize("changed", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("bound", [dgm.STL_ELBO, dgm.IWAE_ELBO])
def test_data_that_do_not_fit_their_site_are_explained(bound, changed):
    """Planted fault: torch's own words pass, of a tensor a that does not match a tensor b."""
    right = {"y": torch.randn(3, 12), "mask": None}
    guide = dgm.AutoFlow(masked, structure="plates").setup(**right)
    assert bound(2)(masked, guide)(**right).isfinite()
    with pytest.raises((ValueError, TypeError), match="[Ss]ite 'y'.*(masks and scales around|of torch.bool)"):
        bound(2)(masked, guide)(**right | changed)


def test_elements_of_another_number_than_at_setup_are_explained():
    """Planted fault: torch's own words pass, as it puts 12 numbers into the units of 15 elements."""
    guide = dgm.AutoFlow(masked, structure="plates").setup(torch.randn(3, 12))
    ask = {
        "guide": lambda y: guide(y),
        "bound": lambda y: dgm.STL_ELBO(2)(masked, guide)(y),
        "container": lambda y: dgm.from_svi(masked, guide, y, num_samples=5, container="dict"),
    }
    for use in ask.values():
        with pytest.raises(
            ValueError, match=r"site 'theta' has shape \(15,\) with these arguments, and \(12,\) in the run"
        ):
            use(torch.randn(3, 15))
