"""from_svi and khat: paired draws, right numbers, names from plates, verdicts that are never NaN."""

import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam

import pyro_dgm as dgm
from pyro_dgm.core.weights import psis
from pyro_dgm.diagnostics.containers import build, group, has_group
from pyro_dgm.diagnostics.khat import judge
from tests.compat_cells import DATA, EVIDENCE, conjugate, exact_guide

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


def export(model, guide, *args, **options):
    return dgm.from_svi(model, guide, *args, **{"num_samples": 300, "prior": 40, "seed": 0} | options)


@pytest.fixture
def schools():
    return export(eight_schools, AutoNormal(eight_schools), ERROR, EFFECT, coords={"school": list("ABCDEFGH")})


def test_b1_eight_schools_dims(schools):
    """B1: plates name the dimensions, coords label them; no singleton dimension is left over."""
    assert {"posterior", "sample_stats", "log_likelihood", "posterior_predictive", "prior", "prior_predictive",
            "observed_data"} <= set(schools.groups())  # fmt: skip
    for name in ("theta", "eta"):
        assert schools.posterior[name].dims == ("chain", "draw", "school")
    assert schools.posterior.mu.shape == (1, 300) and schools.prior_predictive.effect.shape == (1, 40, 8)
    assert schools.observed_data.effect.dims == ("school",) and list(schools.posterior.school.values) == list(
        "ABCDEFGH"
    )
    assert schools.posterior_predictive.effect.std("draw").min() > 5.0  # P2: not the data repeated


def test_b3_draws_are_paired(schools):
    """B3: theta = mu + tau * eta in every draw; the predictive centre is that draw's theta."""
    p = schools.posterior
    np.testing.assert_allclose(p.theta, p.mu + p.tau * p.eta, rtol=1e-5, atol=1e-5)
    rest = (schools.posterior_predictive.effect - p.theta).values[0] / ERROR.numpy()
    assert abs(rest.std() - 1.0) < 0.07 and abs(rest.mean()) < 0.1


def test_b4_loglik(schools):
    """B4: pointwise terms by the Normal's formula; lp is their sum plus the priors."""
    p = {k: torch.as_tensor(schools.posterior[k].values[0]) for k in ("mu", "tau", "eta", "theta")}
    ll = dist.Normal(p["theta"], ERROR).log_prob(EFFECT)
    np.testing.assert_allclose(schools.log_likelihood.effect.values[0], ll, rtol=1e-6, atol=1e-5)
    lp = ll.sum(-1) + dist.Normal(0, 5).log_prob(p["mu"]) + dist.HalfCauchy(5.0).log_prob(p["tau"])
    lp = lp + dist.Normal(0, 1).log_prob(p["eta"]).sum(-1)
    np.testing.assert_allclose(schools.sample_stats.lp.values[0], lp, atol=1e-3)
    assert schools.sample_stats.lp.dtype == np.float64


def test_b2_nested_plates_events_and_deterministic_sites():
    """B2, P7: a lone plate at dim=-2 leaves no singleton; event_dims name the event."""

    def model():
        with pyro.plate("group", 4, dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer={"event_dims": ["feature"]})
            pyro.deterministic("twice", 2.0 * a, event_dim=1)
            with pyro.plate("item", 5, dim=-1):
                pyro.sample("y", dist.Normal(a.sum(-1), 1.0), obs=torch.zeros(4, 5))

    idata = export(model, AutoNormal(model))
    assert idata.posterior.a.dims == ("chain", "draw", "group", "feature") and idata.posterior.a.shape == (1, 300, 4, 3)
    assert idata.log_likelihood.y.dims == ("chain", "draw", "group", "item")
    np.testing.assert_allclose(idata.posterior.twice.values.reshape(300, 4, 3), 2.0 * idata.posterior.a.values[0])


def test_parallel_and_sequential_runs_agree():
    guide = exact_guide()
    for parallel in (True, False):
        idata = export(conjugate, guide, DATA, parallel=parallel)
        np.testing.assert_allclose(idata.sample_stats.log_weight, EVIDENCE, atol=1e-3)
        ll = dist.Normal(torch.as_tensor(idata.posterior.z.values[0])[:, None], 1.0).log_prob(DATA).sum(-1)
        np.testing.assert_allclose(idata.log_likelihood.x.values[0], ll, atol=1e-4)


def test_d4_factor():
    """D4, P13."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -z.square())

    idata = export(model, AutoNormal(model))
    z = idata.posterior.z.values[0]
    np.testing.assert_allclose(
        idata.sample_stats.lp.values[0], dist.Normal(0, 1).log_prob(torch.as_tensor(z)) - z**2, atol=1e-4
    )
    assert not has_group(idata, "observed_data") or "penalty" not in idata.observed_data


def test_d6_reserved_names():
    """D6, P22."""

    def model():
        pyro.sample("draw", dist.Normal(0.0, 1.0))
        with pyro.plate("chain", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match="'(draw|chain)' is a dimension of ArviZ; it is stored as") as said:
        idata = export(model, AutoNormal(model))
    assert len(said) == 2 and "draw_" in idata.posterior and idata.posterior.x.dims == ("chain", "draw", "chain_")


def test_a_seed_reproduces_draws_and_the_store_is_left_alone():
    guide = AutoNormal(conjugate)
    guide(DATA)
    before, state = set(pyro.get_param_store().keys()), torch.get_rng_state()
    first, second = (export(conjugate, guide, DATA).posterior.z.values for _ in range(2))
    assert (first == second).all() and torch.equal(state, torch.get_rng_state())
    assert set(pyro.get_param_store().keys()) == before


def test_what_cannot_be_judged_is_refused():
    """P12, P17: missing latents, point estimates."""
    with pytest.raises(ValueError, match=r"latent sites \['z'\] of the model are not in the guide"):
        export(conjugate, lambda x: None, DATA)
    with pytest.raises(ValueError, match="point estimate"):
        export(conjugate, AutoDelta(conjugate), DATA)
    with pytest.raises(ValueError, match="container='tree': expected one of"):
        export(conjugate, AutoNormal(conjugate), DATA, container="tree")


def test_a_container_without_weights_is_refused():
    import arviz as az

    with pytest.raises(ValueError, match="has no group 'sample_stats'"):
        dgm.khat(az.from_dict(posterior={"z": np.zeros((1, 10))}))
    with pytest.raises(ValueError, match="has no log_weight"):
        dgm.khat({"groups": {"sample_stats": {"lp": np.zeros(10)}}})


def test_f3_no_arviz():
    """F3: with ArviZ hidden, conversion to dictionaries works."""
    code = """
import sys
sys.modules["arviz"] = None
import torch, pyro_dgm as dgm
from tests.compat_cells import DATA, conjugate, exact_guide
groups = dgm.from_svi(conjugate, exact_guide(), DATA, num_samples=20, prior=5, container="dict")["groups"]
print(sorted(groups))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'posterior_predictive'" in done.stdout, done.stderr


def test_d8_float64():
    """D8, P20: 200,000 terms in float32 lose digits; sums are in float64."""
    y = torch.randn(200_000)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1e-3))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    idata = export(model, AutoNormal(model), num_samples=30, prior=0, log_likelihood=False, posterior_predictive=False)
    z = torch.as_tensor(idata.posterior.z.values[0]).double()[:, None]
    truth = dist.Normal(z, 1.0).log_prob(y.double()).sum(-1) + dist.Normal(0.0, 1e-3).log_prob(z[:, 0].float()).double()
    error = torch.as_tensor(idata.sample_stats.lp.values[0]) - truth
    assert error.std() < 1e-3


# --- Pareto smoothing and verdicts -----------------------------------------------------------------------------------


def weights(s, n, seed):
    """log w of q = N(0, 1) for p = N(0, s^2): k = 1 - 1/s^2 in theory."""
    x = np.random.default_rng(seed).normal(size=n)
    return -0.5 * (x / s) ** 2 - np.log(s) + 0.5 * x**2


@pytest.mark.parametrize("s, within", [(1.2, 0.1), (1.5, 0.1), (2.0, 0.1), (4.0, 0.15)])
def test_c2_khat_table(s, within):
    """C2, C3: the mean over 20 repetitions; a wrong sign would give about -1.6."""
    assert abs(np.mean([psis(weights(s, 20_000, i))[1] for i in range(20)]) - (1 - 1 / s**2)) < within


def test_c3_sign():
    """A good proposal has k below 0.3, a bad one above 0.6; with the wrong sign of the weights the bad one has -1.6."""
    good, bad = (np.mean([psis(weights(s, 20_000, i))[1] for i in range(5)]) for s in (1.05, 4.0))
    assert good < 0.3 and bad > 0.6
    assert np.mean([psis(-weights(4.0, 20_000, i))[1] for i in range(5)]) < 0.0


def test_c4_hopeless():
    """C1, C4, P27: constant, hopeless, non-finite and too few weights."""
    rng = np.random.default_rng(0)
    assert judge(np.full(100, -3.0)).status == "exact" and judge(np.full(100, -3.0)).k == -np.inf
    for lw in (
        500.0 * rng.normal(size=1_000),
        np.r_[np.nan, np.zeros(99)],
        np.r_[np.inf, np.zeros(99)],
        np.full(50, -np.inf),
    ):
        verdict = judge(lw)
        assert verdict.status == "bad" and not np.isnan(verdict.k) and not np.isnan(verdict.elbo)
    assert judge(np.zeros(10) + rng.normal(size=10)).status == "bad"
    with pytest.raises(ValueError, match="at least 25 draws"):
        psis(np.zeros(10))


BAD = {
    "too wide": (0.0, 1.5), "much too wide": (0.0, 2.0), "too narrow": (0.0, 0.7), "far too narrow": (0.0, 0.4),
    "shifted by half an sd": (0.5, 1.0), "shifted by one sd": (1.0, 1.0), "shifted and narrow": (0.5, 0.7),
}  # fmt: skip


@pytest.mark.parametrize("features", [1, 4, 10])
@pytest.mark.parametrize("fault", sorted(BAD))
def test_bad_fits_are_not_called_good(fault, features):
    """21 bad Gaussians: k-hat alone calls most of the wide and shifted ones fine (k < 0.7)."""
    shift, scale = BAD[fault]
    z = np.random.default_rng(1).normal(size=(4_000, features))
    x = shift + scale * z
    verdict = judge((-0.5 * x**2 + 0.5 * z**2 + np.log(scale)).sum(-1))
    assert verdict.status in ("usable", "bad")
    assert judge((-0.5 * (1e-3 + z) ** 2 + 0.5 * z**2).sum(-1)).status == "good"


def test_errors_of_elbo_and_evidence_cover_the_truth():
    """Over 200 repetitions, |estimate - truth| < 2 errors in about 95 %."""
    hits = []
    for i in range(200):
        verdict = judge(weights(1.3, 2_000, i))
        hits.append(abs(verdict.log_evidence) < 2 * verdict.log_evidence_error)
    assert 0.85 < np.mean(hits) <= 1.0


def test_a_mean_field_fit_of_a_correlated_posterior_is_not_good():
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]])

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))

    guides = {}
    for make_guide in (AutoNormal, AutoMultivariateNormal):
        pyro.clear_param_store()
        guide = make_guide(model, init_scale=0.3)
        svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO(32, vectorize_particles=True))
        for _ in range(400):
            svi.step()
        guides[make_guide] = dgm.khat(export(model, guide, num_samples=2_000, prior=0)).status
    assert guides[AutoNormal] in ("usable", "bad") and guides[AutoMultivariateNormal] == "good"


def test_build_gives_plain_dictionaries_where_asked():
    made = build({"posterior": {"z": np.zeros((1, 5))}}, {}, {}, {}, "dict")
    assert group(made, "posterior")["z"].shape == (1, 5)


def test_a3_netcdf(schools, tmp_path):
    pytest.importorskip("h5py", reason="ArviZ before 0.22 comes without it")
    import arviz as az

    schools.to_netcdf(str(tmp_path / "s.nc"))
    again = az.from_netcdf(str(tmp_path / "s.nc"))
    assert dgm.khat(again) == dgm.khat(schools)


def test_e1_arviz_calls(tmp_path):
    """Every call of the table on 0.x; tests/diagnostics/check_arviz1.py makes those of 1.x."""
    import arviz as az
    import matplotlib

    matplotlib.use("Agg")
    guide = AutoNormal(eight_schools)
    options = {"log_prior": True, "num_chains": 2, "num_samples": 250}
    idata, other = (export(eight_schools, guide, ERROR, EFFECT, seed=i, **options) for i in (0, 1))
    assert {"mu", "theta[0]"} <= set(az.summary(idata).index) and az.loo(idata, pointwise=True).loo_i.shape == (8,)
    assert list(az.compare({"a": idata, "b": other})["rank"]) == [0, 1]
    assert {"mu", "tau"} <= set(az.psens(idata, component="prior").data_vars)
    khat = az.loo(idata, pointwise=True)
    drawn = {
        "ppc": lambda: az.plot_ppc(idata), "trace": lambda: az.plot_trace(idata, var_names=["mu"]),
        "forest": lambda: az.plot_forest(idata), "pair": lambda: az.plot_pair(idata, var_names=["mu", "tau"]),
        "khat": lambda: az.plot_khat(khat), "pit": lambda: az.plot_loo_pit(idata, y="effect"),
    }  # fmt: skip
    for name, draw in drawn.items():
        np.ravel(draw())[0].figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000, name
        matplotlib.pyplot.close("all")


def test_resampling_by_weights_repairs_a_guide_that_is_off():
    """Planted: a guide half a sd too low and 1.5 times too wide. Uniform picking, the fault, leaves the mean where it was."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x, sd = torch.ones(4), 5**-0.5
    start = pyro.infer.autoguide.init_to_value(values={"mu": torch.tensor(0.8 - 0.5 * sd)})
    guide = dgm.AutoFlow(model, init_loc_fn=start, init_scale=1.5 * sd).setup(x)
    idata = dgm.from_svi(model, guide, x, num_samples=4000, seed=0, prior=0, check=False)
    again = dgm.resample(idata, seed=0)
    assert abs(idata.posterior.mu.mean() - 0.8) > 0.4 * sd and abs(idata.posterior.mu.std() / sd - 1.0) > 0.4
    assert abs(again.posterior.mu.mean() - 0.8) < 0.06 * sd and abs(again.posterior.mu.std() / sd - 1.0) < 0.05
    assert again.log_likelihood.x.dims == ("chain", "draw", "row") and again.sample_stats.attrs["resampled"] == 1
    assert dgm.khat(idata).correction > 0.25 and dgm.khat(idata).status == "usable"
    with pytest.raises(ValueError, match="no log_weight"):
        dgm.resample(again)


def test_a_matrix_that_fails_for_one_draw_is_explained():
    def model():
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        root = torch.linalg.cholesky(s[..., None, None] * torch.eye(2))
        pyro.factor("f", root.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    start = pyro.infer.autoguide.init_to_value(values={"s": torch.tensor(1.0)})
    guide = dgm.AutoFlow(model, init_loc_fn=start, init_scale=0.5).setup()
    with pytest.raises(ValueError, match="could not be factorised for one of 200 draws. Add jitter"):
        dgm.from_svi(model, guide, num_samples=200, prior=0, parallel=True)
