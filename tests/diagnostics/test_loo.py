"""Corrected leave-one-out, comparison, one page, and containers from fits, MCMC and plain draws."""

import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam

import pyro_dgm as dgm
from pyro_dgm.core.weights import arviz_major
from pyro_dgm.diagnostics import (
    compute_log_likelihood,
    compute_log_prior,
    from_posterior_samples,
    sample_posterior_predictive,
)
from pyro_dgm.diagnostics.containers import add_groups, build, group, has_group
from pyro_dgm.diagnostics.loo import elpd_of
from tests.diagnostics.test_diagnostics import EFFECT, ERROR, eight_schools, export

ELPD = -30.742  # eight schools, by quadrature
MU = 4.397
DATA = torch.tensor([0.2, 0.9, 0.4, -0.3])


def normal_mean(x=None, rows=4):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", rows):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def wide_guide(x=None, rows=4):
    """Off by half a sd, 1.5 times too wide."""
    pyro.sample("mu", dist.Normal(0.24 - 0.22, 1.5 * 5**-0.5))


def exact_elpd(x):
    """Each datum given the others, in closed form."""
    n = len(x)
    rest = (x.sum() - x) / n
    return dist.Normal(rest, (1.0 + 1.0 / n) ** 0.5).log_prob(x).sum().item()


def test_loo_is_corrected_for_the_guide():
    """Planted: a wide, shifted guide. Plain ``az.loo`` is off by half a nat, the correction by its own error."""
    import arviz as az

    idata = export(normal_mean, wide_guide, DATA, num_samples=8_000, prior=0)
    result = dgm.loo(idata)
    assert abs(elpd_of(result) - exact_elpd(DATA)) < 5 * result.mcse + 0.005 < 0.06
    assert abs(elpd_of(az.loo(idata)) - exact_elpd(DATA)) > 0.1
    assert elpd_of(dgm.loo(idata, correct=False)) == elpd_of(az.loo(idata))
    assert "elpd_loo" in str(result) and result.pareto_k.dims == ("row",)


def test_draws_of_the_posterior_are_not_corrected_twice():
    idata = export(normal_mean, wide_guide, DATA, num_samples=8_000, prior=0)
    again = dgm.resample(idata, seed=0)
    assert abs(elpd_of(dgm.loo(again)) - exact_elpd(DATA)) < 0.05


def test_loo_says_when_it_cannot_be_trusted():
    """A guide that misses half of the mass: Pareto k of single data, or few effective draws."""
    for loc, scale in ((3.0, 0.3), (1.5, 0.5)):
        lost = lambda x=None, rows=4: pyro.sample("mu", dist.Normal(loc, scale))
        with pytest.warns(UserWarning, match="loo: .*; the estimate is not reliable"):
            dgm.loo(export(normal_mean, lost, DATA, num_samples=2_000, prior=0))


def test_loo_refuses_what_it_cannot_do():
    idata = export(normal_mean, wide_guide, DATA, prior=0)
    with pytest.raises(ValueError, match=r"no variable 'y'; it has \['x'\]"):
        dgm.loo(idata, "y")
    with pytest.raises(ValueError, match="has no group 'log_likelihood'"):
        dgm.loo(export(normal_mean, wide_guide, DATA, prior=0, log_likelihood=False))
    two = {**group(idata, "log_likelihood"), "y": np.zeros((1, 300, 2))}
    with pytest.raises(ValueError, match=r"log_likelihood has the variables \['x', 'y'\]; say which"):
        dgm.loo(build({"log_likelihood": two}, {}, {}, {}))
    with pytest.raises(ValueError, match=r"compare: expected two or more models, got \['a'\]"):
        dgm.compare({"a": idata})


@pytest.fixture(scope="module")
def four_fits():
    """Eight schools, non-centred and nearly so, by diagonal, low-rank and full Gaussians: four fits of one model.

    Gaussians of the fully centred model miss its funnel: k-hat is above 0.7, which loo says, and no weight repairs them.
    """

    def centred(error, effect=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(error)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("effect", dist.Normal(theta, error), obs=effect)

    near = pyro.poutine.reparam(centred, config={"theta": LocScaleReparam(centered=0.2)})
    made = {}
    for name, model, make in (
        ("non-centred", eight_schools, AutoMultivariateNormal), ("non-centred", eight_schools, AutoNormal),
        ("0.2-centred", near, AutoMultivariateNormal), ("0.2-centred", near, AutoLowRankMultivariateNormal),
    ):  # fmt: skip
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make(model)
        loss = Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.994}), loss)
        for _ in range(600):
            svi.step(ERROR, EFFECT)
        made[f"{name} {make.__name__}"] = export(model, guide, ERROR, EFFECT, num_samples=8_000, prior=0, check=False)
    return made


def test_c5_eight_schools(four_fits):
    """Corrected elpd within 0.15 of the exact -30.742; as users call it, ``az.loo`` is off by more than 0.2 for two fits."""
    import arviz as az

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corrected = {k: elpd_of(dgm.loo(v)) for k, v in four_fits.items()}
        naive = [elpd_of(az.loo(v)) for v in four_fits.values()]
    assert all(abs(v - ELPD) < 0.15 for v in corrected.values()), corrected
    assert sum(abs(v - ELPD) > 0.2 for v in naive) >= 2, naive


def test_c6_sir(four_fits):
    """Resampled draws have the exact posterior mean of mu, within four of their own errors."""
    idata = min(four_fits.values(), key=lambda made: dgm.khat(made).k)
    assert dgm.khat(idata).k < 0.7
    mu = dgm.resample(idata, seed=0).posterior.mu.values
    assert abs(mu.mean() - MU) < 4 * mu.std() / dgm.khat(idata).ess ** 0.5


def test_c7_compare(four_fits):
    """Four fits of one model: no winner without a warning."""
    with pytest.warns(UserWarning, match="is not resolved: their order and the weights do not say that one is better"):
        table = dgm.compare(four_fits)
    assert np.ptp(table["elpd_loo" if arviz_major() == 0 else "elpd"]) < 0.15 and set(table.index) == set(four_fits)


def test_compare_says_nothing_where_models_differ():
    """A sd of 1 against one of 5 on 60 data of sd 1: 30 nats and more."""

    def of_scale(s):
        def model(x):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("row", len(x)):
                pyro.sample("x", dist.Normal(mu, s), obs=x)

        return model, lambda x: pyro.sample("mu", dist.Normal(x.mean(), s * len(x) ** -0.5))

    x = torch.randn(60)
    made = {str(s): export(*of_scale(s), x, prior=0, num_samples=1_000) for s in (1.0, 5.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        table = dgm.compare(made)
    assert table.index[0] == "1.0" and table["elpd_diff"].iloc[1] > 30.0


# --- Other makers of containers ---------------------------------------------------------------------------------------------


def test_fits_become_chains_and_rhat_compares_them():
    """Two fits that agree, and one a sd off: R-hat tells, and the weights of all chains give one evidence."""

    def at(shift):
        return lambda x=None, rows=4: pyro.sample("mu", dist.Normal(0.24 + shift, 5**-0.5))

    import arviz as az

    evidence = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1.0).log_prob(DATA).item()
    agree = dgm.from_fits([at(0.0), at(0.05)], normal_mean, DATA, num_samples=1_000, prior=0, seed=0)
    apart = dgm.from_fits([at(0.0), at(0.5)], normal_mean, DATA, num_samples=1_000, prior=0, seed=0)
    assert agree.posterior.mu.shape == (2, 1_000)
    assert az.rhat(agree).mu < 1.02 and az.rhat(apart).mu > 1.1
    for made in (agree, apart):
        v = dgm.khat(made)
        assert abs(v.log_evidence - evidence) < 4 * v.log_evidence_error + 1e-3
        assert len(made.sample_stats.attrs["khat_by_chain"]) == 2
    with pytest.raises(ValueError, match="from_fits: got an empty list of guides"):
        dgm.from_fits([], normal_mean, DATA)


def test_mcmc_becomes_a_container():
    """Plates, deterministic sites, divergences; discrete sites that NUTS summed out come back."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 2.0]), 0.5).to_event(1))
        pyro.deterministic("gap", loc[..., 1] - loc[..., 0])
        with pyro.plate("row", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[..., 0] * (1 - k) + loc[..., 1] * k, 1.0), obs=x)

    x = torch.tensor([-2.5, 2.0, 0.1])
    mcmc = MCMC(NUTS(model, max_plate_nesting=1), num_samples=100, warmup_steps=50, disable_progbar=True)
    with pytest.raises(ValueError, match="this MCMC has no draws"):
        dgm.from_pyro_mcmc(mcmc, x)
    mcmc.run(x)
    idata = dgm.from_pyro_mcmc(mcmc, seed=0)  # the arguments of run
    np.testing.assert_array_equal(idata.posterior["loc"].values[0], mcmc.get_samples()["loc"])
    loc = idata.posterior["loc"].values[0]
    np.testing.assert_allclose(idata.posterior.gap.values[0], loc[:, 1] - loc[:, 0], atol=1e-5)
    joint = dist.Normal(torch.as_tensor(loc)[:, None], 1.0).log_prob(x[:, None]) - np.log(2.0)
    np.testing.assert_allclose(idata.log_likelihood.x.values[0], joint.logsumexp(-1), atol=1e-5)
    assert idata.posterior.k.dims == ("chain", "draw", "row") and idata.posterior.k.values[0, :, 0].mean() < 0.1
    assert idata.sample_stats.diverging.dtype == bool and set(idata.observed_data.data_vars) == {"x"}
    assert np.isfinite(elpd_of(dgm.loo(idata)))
    mcmc.kernel.model = None
    with pytest.raises(ValueError, match="the kernel was made from potential_fn and has no model"):
        dgm.from_pyro_mcmc(mcmc, x)


def test_any_draws_with_or_without_log_q():
    q = dist.Normal(0.2, 0.6)
    mu = q.sample((2_000,))
    plain = from_posterior_samples(normal_mean, {"mu": mu}, DATA, prior=0, num_chains=2)
    weighted = from_posterior_samples(normal_mean, {"mu": mu.numpy()}, DATA, log_q=q.log_prob(mu), prior=0)
    assert plain.posterior.mu.shape == (2, 1_000) and "log_weight" not in plain.sample_stats
    evidence = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1.0).log_prob(DATA).item()
    v = dgm.khat(weighted)
    assert abs(v.log_evidence - evidence) < 4 * v.log_evidence_error
    with pytest.raises(
        ValueError, match=r"expected the same number of draws for every site, a multiple of num_chains=3"
    ):
        from_posterior_samples(normal_mean, {"mu": mu}, DATA, num_chains=3)
    with pytest.raises(ValueError, match=r"log_q has shape \(3,\), expected \(2000,\)"):
        from_posterior_samples(normal_mean, {"mu": mu}, DATA, log_q=torch.zeros(3))
    with pytest.raises(ValueError, match=r"latent sites \['mu'\] of the model are not in the draws"):
        from_posterior_samples(normal_mean, {"nu": mu}, DATA)


@pytest.mark.parametrize("kind", ["auto", "dict"])
def test_groups_can_be_added_afterwards(kind):
    """What is added equals what the converter would have written at once; a group of the same name is replaced."""
    options = {"prior": 0, "container": kind, "coords": {"row": list("abcd")}}
    whole = export(normal_mean, wide_guide, DATA, log_prior=True, **options)
    bare = export(normal_mean, wide_guide, DATA, log_likelihood=False, posterior_predictive=False, **options)
    assert not has_group(bare, "log_likelihood")
    for add in (compute_log_likelihood, compute_log_prior, sample_posterior_predictive, compute_log_likelihood):
        assert add(bare, normal_mean, DATA) is bare
    for name in ("log_likelihood", "log_prior"):
        for variable, values in group(whole, name).items():
            np.testing.assert_allclose(group(bare, name)[variable], values, atol=1e-6)
    assert group(bare, "posterior_predictive")["x"].shape == (1, 300, 4)
    if kind == "auto":
        assert list(bare.log_likelihood.row.values) == list("abcd")
    arrays = compute_log_prior(bare, normal_mean, DATA, extend=False)
    np.testing.assert_allclose(
        arrays["mu"], dist.Normal(0.0, 1.0).log_prob(torch.as_tensor(group(bare, "posterior")["mu"])), atol=1e-6
    )
    with pytest.raises(ValueError, match="latent sites"):
        compute_log_likelihood(bare, eight_schools, ERROR, EFFECT)


def test_predictions_for_new_inputs():
    """Deterministic sites follow the new inputs; a latent of new rows is drawn anew, with a warning."""

    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 0.1))
            mean = pyro.deterministic("mean", slope * x + shift)
            pyro.sample("y", dist.Normal(mean, 0.01), obs=y)

    x, new = torch.tensor([0.0, 1.0]), torch.tensor([3.0, -1.0, 0.5])
    guide = AutoNormal(model)
    with pytest.warns(UserWarning, match=r"latent sites \['shift'\] have another shape for the new arguments"):
        idata = export(model, guide, x, x, prior=0, predictions=((new,), {}))
    p = idata.predictions
    np.testing.assert_allclose(p["mean"], idata.posterior.slope.values[..., None] * new.numpy() + p["shift"], atol=1e-5)
    assert abs(p["y"] - p["mean"]).max() < 0.06 and p["y"].dims == ("chain", "draw", "row_new")
    assert list(idata.predictions_constant_data["x"].values) == new.tolist() and p["shift"].values.std() > 0.05
    with pytest.warns(UserWarning, match="another shape"):
        later = sample_posterior_predictive(idata, model, new, predictions=True, seed=0)
    np.testing.assert_allclose(
        later.predictions["mean"],
        idata.posterior.slope.values[..., None] * new.numpy() + later.predictions["shift"],
        atol=1e-5,
    )
    with pytest.raises(ValueError, match=r"expected \(args, kwargs\), the model's new arguments"):
        export(model, guide, x, x, predictions=new)


def test_constant_data_dims_and_event_dims():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("both", torch.stack([w, -w], -1))
        pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=x.sum())

    x = torch.tensor([1.0, 2.0])
    idata = export(model, AutoNormal(model), x, constant_data={"x": x}, dims={"x": ["feature"], "w": ["feature"]},
                   extra_event_dims={"both": ["feature", "sign"]}, coords={"feature": ["u", "v"]}, num_chains=2)  # fmt: skip
    assert list(idata.constant_data.x.feature.values) == ["u", "v"] and idata.posterior.both.dims[2:] == (
        "feature",
        "sign",
    )
    assert idata.posterior.w.dims == ("chain", "draw", "feature") and idata.posterior.w.shape == (2, 300, 2)


# --- Containers --------------------------------------------------------------------------------------------------------------


def test_a1_both_lines():
    """The fixed dictionary of tests/diagnostics/check_arviz1.py gives the same groups, dims and dtypes on either line."""
    from tests.diagnostics.check_arviz1 import DIMS, GROUPS, example, laid_out

    made = build(example(), DIMS, {"item": list("abcdefgh")}, {"/": {"creation_library": "pyro_dgm"}})
    assert laid_out(made) == GROUPS and made.attrs["creation_library"] == "pyro_dgm"


def test_containers_and_verdicts_load_without_torch():
    """As tests/diagnostics/check_arviz1.py loads them; planted fault: an import of Pyro in containers.py."""
    code = """
import sys
sys.modules["torch"] = sys.modules["pyro"] = None
from tests.diagnostics.check_arviz1 import stand_in_for_the_package
stand_in_for_the_package()
import pyro_dgm.diagnostics.check
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a2_version_dispatch():
    """0.x reads a call of 1.x in silence, as one variable "posterior"; build asks the version, and refuses the other's kind."""
    import arviz as az

    from pyro_dgm.core.weights import arviz_major

    misread = az.from_dict({"posterior": {"z": np.zeros((1, 5))}}) if arviz_major() == 0 else None
    assert misread is None or "z" not in misread.posterior
    made = build({"posterior": {"z": np.zeros((1, 5))}}, {}, {}, {})
    assert list(group(made, "posterior")) == ["z"]
    other = "datatree" if arviz_major() == 0 else "inferencedata"
    with pytest.raises(ValueError, match=f"container='{other}': expected one of"):
        build({}, {}, {}, {}, other)
    assert add_groups(made, {"log_prior": {"z": np.zeros((1, 5))}}, {}, {}) is made and has_group(made, "log_prior")


# --- One page -------------------------------------------------------------------------------------------------------------


def test_check_says_what_is_wrong(tmp_path):
    """A good fit, a guide that is off, and a model that cannot give the data: three different advices, one picture each."""
    exact = lambda x=None, rows=4: pyro.sample("mu", dist.Normal(0.24, 5**-0.5))
    lost = lambda x=None, rows=4: pyro.sample("mu", dist.Normal(3.0, 0.1))
    outlier = torch.tensor([0.0, 0.1, -0.2, 14.0])
    at_outlier = lambda x=None, rows=4: pyro.sample("mu", dist.Normal(outlier.sum() / 5, 5**-0.5))
    pages = {
        "Use it": dgm.check(export(normal_mean, exact, DATA, num_samples=1_000)),
        "First the posterior": dgm.check(export(normal_mean, lost, DATA, num_samples=1_000)),
        "it does not give the sd of x": dgm.check(export(normal_mean, at_outlier, outlier, num_samples=1_000)),
        "resample": dgm.check(export(normal_mean, wide_guide, DATA, num_samples=1_000)),
    }
    for i, (advice, page) in enumerate(pages.items()):
        assert advice in str(page).splitlines()[-1], str(page)
        page.picture(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 20_000
    with pytest.raises(ValueError, match="check: the container has neither weights nor log_likelihood"):
        dgm.check(build({"posterior": {"z": np.zeros((1, 5))}}, {}, {}, {}))


def test_check_reads_mcmc(tmp_path, monkeypatch):
    """Planted: the legend of the k of data has a marker, which looks like a datum."""
    page = dgm.check(dgm.resample(export(normal_mean, wide_guide, DATA, num_samples=1_000), seed=0))
    assert page.verdict is None and "read R-hat" in str(page) and page.elpd["x"][0] < 0
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    page.picture(tmp_path / "m.png")
    legend = next(ax for ax in figures[0].axes if ax.get_title().startswith("Pareto k")).get_legend()
    assert [line.get_markersize() for line in legend.get_lines()] == [0.0]
