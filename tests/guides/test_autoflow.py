"""AutoFlow: right before training, and accurate after it."""

import copy
import functools
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, init_to_value
from pyro.optim import ClippedAdam

import pyro_dgm as dgm
from pyro_dgm.diagnostics.short_chains import look_around
from pyro_dgm.guides.start import find_start
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.train.players import by_rate
from tests.compat_cells import DATA, EVIDENCE, MEAN, PRECISION, conjugate

SCALES = torch.tensor([1e-3, 1.0, 1e4])


def far_and_scaled(x=None):
    """A Gaussian posterior with centres 1e3 sd from the prior's and scales from 1e-3 to 1e4, correlation 0.99."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1e6).to_event(1))
    u = z / SCALES.double()
    first, total = u[..., 0], u.sum(-1)
    pyro.sample("a", dist.Normal(first, 0.1), obs=torch.tensor(1000.0).double())
    pyro.sample("b", dist.Normal(total, 0.1), obs=torch.tensor(-500.0).double())
    pyro.sample("c", dist.Normal(u[..., 1] - u[..., 2], 5.0), obs=torch.tensor(0.0).double())


def flat(x=None):
    """An improper prior, which no initialisation of Pyro can sample."""
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", 50):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.linspace(29.0, 31.0, 50))


@pytest.mark.parametrize("family", [None, dgm.RealNVP, dgm.MAF, dgm.NSF], ids=str)
def test_before_training_it_is_autodiagonalnormal_at_init_loc(family):
    """Densities agree point by point. Planted fault: an init_loc_fn that is ignored, as in AutoIAFNormal."""
    at = init_to_value(values={"z": torch.tensor([30.0, -2.0])})
    guide = dgm.AutoFlow(conjugate, family, init_loc_fn=at, init_scale=0.2).setup(DATA)
    normal = AutoDiagonalNormal(conjugate, init_loc_fn=at, init_scale=0.2)
    normal(DATA)
    x = torch.tensor([30.0, -2.0]) + 0.2 * torch.randn(50, 2)
    torch.testing.assert_close(guide._posterior().log_prob(x), normal.get_posterior().log_prob(x), atol=2e-3, rtol=1e-4)


def test_the_start_is_affine_invariant():
    """Scales from 1e-3 to 1e4 and correlations near one: the start is within 0.15 nat of the posterior, in closed form."""
    guide = dgm.AutoFlow(far_and_scaled).setup()
    start = find_start(LogJoint(guide, far_and_scaled, (), {}))
    A = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, -1.0]]).double() / SCALES.double()
    noise = torch.tensor([0.1, 0.1, 5.0]).double().square()
    y = torch.tensor([1000.0, -500.0, 0.0]).double()
    precision = A.T @ torch.diag(1.0 / noise) @ A + 1e-12 * torch.eye(3).double()
    truth = torch.linalg.solve(precision, A.T @ (y / noise))
    assert ((start.loc[0] - truth) / precision.inverse().diagonal().sqrt()).abs().max() < 0.3
    white = torch.linalg.cholesky(precision).T  # in whose units the posterior is standard normal
    tril = white @ start.scale_tril[0]
    q = dist.MultivariateNormal(white @ (start.loc[0] - truth), tril @ tril.T)
    standard = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    assert torch.distributions.kl_divergence(q, standard) < 0.15


def test_a_fit_reaches_the_exact_posterior_and_evidence():
    guide = dgm.AutoFlow(conjugate)
    history = dgm.fit(dgm.STL_ELBO()(conjugate, guide), DATA, progress=False, seed=0)
    verdict = dgm.khat(dgm.from_svi(conjugate, guide, DATA, num_samples=2_000, prior=0, seed=0))
    assert history.stopped == "converged" and verdict.status in ("exact", "good")
    assert abs(verdict.elbo - EVIDENCE) < 0.02
    z = guide.draws(10_000, DATA)["z"]
    torch.testing.assert_close(z.mean(0), MEAN, atol=5 * (PRECISION * 10_000) ** -0.5, rtol=0.0)
    torch.testing.assert_close(z.std(0), torch.full((2,), PRECISION**-0.5), atol=0.0, rtol=0.05)


def skewed(y):
    """The scale of three data: far from normal."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Laplace(0.0, scale), obs=y)


def test_a_flow_takes_no_step_where_the_start_is_right():
    """And some where it is not. Planted: no look before the first step (50 and 50 steps), one that is always content (0, 0)."""
    fits = [dgm.fit(dgm.STL_ELBO()(m, dgm.AutoFlow(m)), x, progress=False, seed=0) for m, x in
            ((conjugate, DATA), (skewed, torch.tensor([0.1, -2.0, 0.5])))]  # fmt: skip
    assert [h.stopped for h in fits] == ["converged", "converged"]
    assert fits[0].steps == 0 < fits[1].steps <= 300 and torch.tensor(fits[0].best_loss).isfinite()


def test_a_mean_that_is_off_is_not_right_whatever_the_gap():
    """By .12 sd of one coordinate, a KL of .007. Planted: the gap alone; Pareto k stays small too."""
    guide = dgm.AutoFlow(conjugate)
    objective = dgm.STL_ELBO()(conjugate, guide)
    guide.warm_start(DATA)
    assert objective.converged(DATA)
    for row, change in ((0, 0.12), (1, 0.1)):
        with torch.no_grad():
            guide._posterior.affine[row, 0] += change
            assert not objective.converged(DATA), row
            guide._posterior.affine[row, 0] -= change


def test_a_model_that_learns_is_no_reason_to_stop_at_a_right_guide():
    """The scale of a prior, by its evidence: 2 from the data, 1 at first. Planted: a guide that is right at once ends the fit."""

    def learns(y):
        scale = pyro.param("prior_scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 0.1), obs=y)

    y = 2.0 * torch.tensor([-1.2, 0.3, 1.0, -0.4, 1.4, -1.1])
    history = dgm.fit(dgm.STL_ELBO()(learns, dgm.AutoFlow(learns)), y, progress=False, seed=0)
    assert history.steps >= 300 and pyro.param("prior_scale").item() > 1.3


def test_a_stock_guide_is_judged_by_the_steps_of_its_own_fit():
    """Planted: log weights of the fit before, on other data, that say at the first step that all is well."""
    guide = AutoDiagonalNormal(conjugate)
    objective = dgm.STL_ELBO()(conjugate, guide)
    first = dgm.fit(objective, DATA, progress=False, seed=0, lr=0.05)
    again = dgm.fit(objective, DATA + 3.0, progress=False, seed=0, lr=0.05)
    assert first.stopped == "converged" and again.steps > 0


def unobserved():
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(0.0, 1.0))


FAST_TO_DRAW = [None, dgm.RealNVP, functools.partial(dgm.MAF, fast="sampling")]


@pytest.mark.parametrize("rate", [0.02, 0.05])
@pytest.mark.parametrize("family", FAST_TO_DRAW, ids=["default", "RealNVP", "MAF"])
def test_stock_svi_trains_at_the_rates_of_other_guides(family, rate):
    """KL below 0.3 after 60 steps from a small Gaussian, and no loss above 100 (it starts at 8).

    Planted: conditioners whose last layers are not scaled, and bounds of 3 and 6.9 on a log scale. The default is then NaN
    by step 4 for three seeds of four at 0.05, and RealNVP for all; MAF reaches losses of 400.
    """
    for seed in range(4):
        pyro.clear_param_store(), pyro.set_rng_seed(seed)
        elbo = pyro.infer.Trace_ELBO(100, vectorize_particles=True)
        svi = pyro.infer.SVI(unobserved, dgm.AutoFlow(unobserved, family), ClippedAdam({"lr": rate}), elbo)
        losses = torch.tensor([svi.step() for _ in range(60)])
        assert losses.max() < 100.0 and losses[-10:].mean() < 0.3, (seed, losses)


@pytest.mark.parametrize("family", FAST_TO_DRAW, ids=["default", "RealNVP", "MAF"])
def test_what_a_guide_does_to_a_family_is_kept_with_it(family):
    """Densities of copies and of a reloaded state. Planted: gains that no state has; a bare family then takes the state."""
    guide = dgm.AutoFlow(conjugate, family).setup(DATA)
    with torch.no_grad():
        for parameter in guide._posterior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fresh = dgm.AutoFlow(conjugate, family).setup(DATA)
    fresh.load_state_dict(guide.state_dict())
    x = 0.1 * torch.randn(20, 2)
    expected = guide._posterior().log_prob(x)
    for other in (fresh, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(other._posterior().log_prob(x), expected)
    if family is not None:
        with pytest.raises(RuntimeError, match="gain"):
            family(2).load_state_dict(guide._posterior.components[0].family.state_dict())


def test_fit_gives_the_flow_its_own_rate_unless_told():
    """Other parameters of the objective keep the default. Planted: one rate for all."""
    objective = dgm.STL_ELBO()(conjugate, dgm.AutoFlow(conjugate).setup(DATA))
    for lr, most in ((None, 3e-2), (1e-3, 1e-3)):
        assert 0.2 * most < max(dgm.fit(objective, DATA, lr=lr, max_steps=60, progress=False).learning_rate) <= most
    objective.register_parameter("other", torch.nn.Parameter(torch.tensor(0.0)))
    groups = {g["lr"]: len(g["params"]) for g in by_rate(objective, list(objective.parameters()), 5e-3)}
    assert groups == {5e-3: 1, 3e-2: len(list(objective.guide.parameters()))}


def test_flat_priors_start_where_the_data_are():
    guide = dgm.AutoFlow(flat)
    dgm.fit(dgm.STL_ELBO()(flat, guide), (), progress=False, max_steps=100, seed=0)
    assert abs(guide.median()["mu"] - 30.0) < 5 * 0.0125 * 50**-0.5 + 0.02


@pytest.mark.parametrize(
    "name", ["eight_schools-eight_schools_noncentered", "kilpisjarvi_mod-kilpisjarvi", "mesquite-mesquite"]
)
def test_reference_posteriors_are_reached_by_default(shared, monkeypatch, name):
    """Means and sds within 0.1 of 10,000 reference draws, evidence within 0.1 nat of bridge sampling."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.syspath_prepend(str(shared / "posteriordb"))
    import kit

    p = kit.load(name)
    guide = dgm.AutoFlow(p.model)
    dgm.fit(dgm.STL_ELBO()(p.model, guide), (p.data,), progress=False, seed=1)
    draws = p.matrix(guide.draws(4_000, p.data))
    assert (abs(draws.mean(0) - p.ref_mean) / p.ref_sd).max() < 0.1
    assert abs(torch.as_tensor(draws.std(0) / p.ref_sd).log()).max() < 0.1
    verdict = dgm.khat(dgm.from_svi(p.model, guide, p.data, num_samples=4_000, prior=0, log_likelihood=False))
    assert verdict.status == "good" and abs(verdict.elbo - p.logZ) < 0.1


def test_a_discrete_or_unsupported_site_is_refused_by_name():
    def model():
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    with pytest.raises(ValueError, match=r"site 'k' is discrete .Categorical.*'enumerate': 'parallel'"):
        dgm.AutoFlow(model).setup()


def test_a_latent_that_the_data_do_not_touch_keeps_its_prior():
    def model(x):
        pyro.sample("idle", dist.Normal(3.0, 2.0))
        conjugate(x)

    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), DATA, progress=False, seed=0)
    idle = guide.draws(10_000, DATA)["idle"]
    assert abs(idle.mean() - 3.0) < 0.1 and abs(idle.std() - 2.0) < 0.1


def test_a_log_density_that_is_never_finite_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z * torch.nan + x.sum())

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="not finite at any of the starting points"):
        guide = dgm.AutoFlow(model)
        dgm.fit(dgm.STL_ELBO()(model, guide), torch.zeros(2), progress=False)


def matmul(x, y):
    """The natural way to write a regression, which does not broadcast over draws."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def summed(x, y):
    """Runs vectorised without an error, and wrong."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(b.sum(), 1.0), obs=y[0])


def branching(x, y):
    """Control flow on a value: neither a plate nor vmap can run it."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    total = b.sum() if bool((b.abs() < 100.0).all()) else b.sum() + torch.nan
    pyro.sample("y", dist.Normal(total, 1.0), obs=y[0])


@pytest.mark.parametrize("model", [matmul, summed, branching])
def test_models_that_do_not_vectorise_are_noticed_and_still_right(model):
    """Planted fault: trusting the plate; `summed` then has a wrong evidence and no error."""
    x, y = torch.randn(20, 3), torch.randn(20)
    guide = dgm.AutoFlow(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dgm.fit(dgm.STL_ELBO()(model, guide), (x, y), progress=False, max_steps=20, seed=0)
        verdict = dgm.khat(dgm.from_svi(model, guide, x, y, num_samples=200, prior=0, posterior_predictive=False))
    said = any("cannot run many draws at once" in str(w.message) for w in caught)
    assert said == (model is branching)
    if model is not matmul:
        evidence = dist.Normal(0.0, 2.0).log_prob(y[0])
    else:
        evidence = dist.MultivariateNormal(torch.zeros(20), torch.eye(20) + x @ x.T).log_prob(y)
    assert abs(verdict.log_evidence - evidence) < 0.1


def test_stale_store_entries_of_another_guide_do_not_replace_trained_parameters():
    """Two guides of one name in one session; Pyro would read the first one's parameters into the second."""
    first, second = dgm.AutoFlow(conjugate), dgm.AutoFlow(conjugate)
    for guide, x in ((first, DATA), (second, DATA + 5.0)):
        dgm.fit(dgm.STL_ELBO()(conjugate, guide), x, progress=False, max_steps=50, seed=0)
    for guide, x in ((first, DATA), (second, DATA + 5.0), (first, DATA)):
        mean = torch.stack([poutine.trace(guide).get_trace(x).nodes["z"]["value"] for _ in range(200)]).mean(0)
        torch.testing.assert_close(mean, x.sum(0) / PRECISION, atol=0.15, rtol=0.0)


def test_a_store_of_another_shape_is_refused():
    pyro.param("AutoFlow.posterior$$$components.0.affine", torch.zeros(7))
    with pytest.raises(
        ValueError, match=r"holds AutoFlow.posterior\$\$\$components.0.affine with shape \(7,\).*clear_param_store"
    ):
        dgm.AutoFlow(conjugate)(DATA)


def test_families_that_are_no_transform_refuse_neutra():
    from pyro_dgm.core import zuko

    guide = dgm.AutoFlow(conjugate, lambda D: dgm.ZukoFlow(zuko.mixtures.GMM(D, components=2))).setup(DATA)
    with pytest.raises(NotImplementedError, match="no transform of a base"):
        guide.get_transform()
    with pytest.raises(ValueError, match="not reparameterised"):
        dgm.STL_ELBO()(conjugate, guide)(DATA)


def test_neutra_is_right_where_the_guide_is_not():
    """NUTS through an untrained guide reaches the exact posterior, with R-hat and divergences in the container."""
    import arviz as az

    guide = dgm.AutoFlow(conjugate, init_scale=1.0).setup(DATA)
    with pytest.raises(ValueError, match="at least 4"):
        dgm.neutra(conjugate, guide, DATA, num_samples=3)
    idata = dgm.neutra(conjugate, guide, DATA, num_samples=200, warmup_steps=100, seed=0, progress=False)
    z = torch.as_tensor(idata.posterior.z.values).reshape(-1, 2)
    assert ((z.mean(0) - MEAN) * PRECISION**0.5).abs().max() < 0.2
    assert (z.std(0) * PRECISION**0.5 - 1.0).abs().max() < 0.15
    assert az.summary(idata)["r_hat"].max() < 1.05 and idata.posterior_predictive.x.shape == (2, 200, 6, 2)
    assert not idata.sample_stats.diverging.any() and idata.log_likelihood.x.dims == ("chain", "draw", "data")


def two_modes(weight):
    ends = dist.Normal(torch.tensor([-3.0, 3.0]), 0.7)
    x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.stack([1.0 - weight, weight])), ends))
    pyro.sample("y", dist.Normal(0.3 * x, 1.0))


@pytest.mark.parametrize("weight", [0.5, 0.7])
def test_both_modes_are_kept_with_their_weights(weight):
    """A single flow, the planted fault, keeps one mode: its share is 0 or 1."""
    args = (torch.tensor(weight),)
    guide = dgm.AutoFlow(two_modes)
    dgm.fit(dgm.STL_ELBO()(two_modes, guide), args, max_steps=200, seed=0, progress=False)
    assert guide.modes == 2
    assert (guide.draws(4000, *args)["x"] > 0).double().mean().item() == pytest.approx(weight, abs=0.05)
    from_store = dgm.AutoFlow(two_modes)
    from_store(*args)
    assert from_store.modes == 2
    fresh = dgm.AutoFlow(two_modes).setup(*args)
    fresh.load_state_dict(guide.state_dict())
    latent = torch.randn(5, 2)
    torch.testing.assert_close(fresh.get_posterior().log_prob(latent), guide.get_posterior().log_prob(latent))
    with pytest.raises(NotImplementedError, match="mixture of flows"):
        guide.get_transform()


def test_a_density_of_two_modes_integrates_to_one():
    """Weights that do not sum to one, or draws counted once per component, show here."""
    args = (torch.tensor(0.7),)
    guide = dgm.AutoFlow(two_modes)
    guide.warm_start(*args)
    axis = torch.linspace(-9.0, 9.0, 361)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    total = guide.get_posterior().log_prob(grid).exp().sum() * 0.05**2
    assert total.item() == pytest.approx(1.0, abs=1e-3)


def test_a_mode_that_the_guide_lacks_is_found_by_the_verdict():
    """Planted: one of two modes is dropped. Every weight then looks perfect; only climbing prior draws see it."""
    args = (torch.tensor(0.5),)
    guide = dgm.AutoFlow(two_modes)
    dgm.fit(dgm.STL_ELBO()(two_modes, guide), args, max_steps=200, seed=0, progress=False)
    whole = dgm.khat(dgm.from_svi(two_modes, guide, *args, prior=0, seed=0))
    guide._posterior.keep([0])
    half = dgm.khat(dgm.from_svi(two_modes, guide, *args, prior=0, seed=0))
    assert whole.status == "good" and whole.other_modes == 0
    assert half.gap < 0.05 and half.other_modes == 1 and half.status == "usable"
    assert "1 more mode(s) were found" in str(half)


def schools(y, sigma):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def test_short_chains_leave_a_planted_bad_guide_and_stay_with_a_good_one():
    """Planted: the trained flow of a funnel is shifted by half a sd, narrowed to 0.7, widened to 1.5."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    guide = dgm.AutoFlow(schools)
    dgm.fit(dgm.STL_ELBO()(schools, guide), (y, sigma), seed=0, progress=False, max_steps=500)
    look = lambda: look_around(schools, guide, (y, sigma), {})
    assert not look().moved and look().other_modes == 0
    affine, kept = guide._posterior.affine, guide._posterior.affine.detach().clone()
    for shift, log_scale in [(0.5, 0.0), (0.0, -0.36), (0.0, 0.41)]:
        with torch.no_grad():
            affine.copy_(kept + torch.tensor([[shift], [log_scale]]))
        assert look().moved, (shift, log_scale)
