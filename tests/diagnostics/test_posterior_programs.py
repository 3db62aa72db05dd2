"""What programs may contain: subsamples, discrete sites, masks, missing data, models that hardly vectorise, any guide.

Cells B5, B6, C1, D1, D2, D3, D5, D7, D9, F1, F2 of the facts about ArviZ.
"""

import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.ops.indexing import Vindex

import pyro_dgm as dgm
from pyro_dgm.diagnostics import from_posterior_samples
from pyro_dgm.diagnostics.containers import has_group
from pyro_dgm.diagnostics.loo import elpd_of
from tests.compat_cells import DATA, EVIDENCE, conjugate
from tests.diagnostics.test_diagnostics import EFFECT, ERROR, eight_schools, export

X = torch.tensor([0.3, 0.9, -0.5, 0.2, 1.1, 0.0, -1.2, 0.7, 2.0, -0.4])


def draws_of(idata, *names):
    return {k: torch.as_tensor(idata.posterior[k].values.reshape(-1, *idata.posterior[k].shape[2:])) for k in names}


def test_b5_lp_and_log_q_against_single_runs():
    """20 draws, each replayed alone through guide and model."""
    guide = AutoNormal(eight_schools)
    idata = export(eight_schools, guide, ERROR, EFFECT, num_samples=20, prior=0)
    draws = draws_of(idata, "mu", "tau", "eta")
    for i in range(20):
        row = {k: v[i] for k, v in draws.items()}
        p = poutine.trace(poutine.condition(eight_schools, row)).get_trace(ERROR, EFFECT)
        u = {"mu_unconstrained": row["mu"], "tau_unconstrained": row["tau"].log(), "eta_unconstrained": row["eta"]}
        q = (
            sum(
                dist.Normal(getattr(guide.locs, k), getattr(guide.scales, k)).log_prob(u[f"{k}_unconstrained"]).sum()
                for k in row
            )
            - row["tau"].log()
        )
        assert abs(p.log_prob_sum() - idata.sample_stats.lp.values[0, i]) < 1e-4
        assert abs(q - idata.sample_stats.log_q.values[0, i]) < 1e-4


def test_b6_uncondition():
    """Drawing data anew leaves a deterministic site of a plate in its shape."""
    idata = export(eight_schools, AutoNormal(eight_schools), ERROR, EFFECT, prior=500)
    assert idata.prior_predictive.effect.shape == (1, 500, 8) and idata.prior.theta.shape == (1, 500, 8)
    np.testing.assert_allclose(
        idata.prior.theta, idata.prior.mu + idata.prior.tau * idata.prior.eta, rtol=1e-4, atol=1e-4
    )


def test_c1_exact_evidence():
    """The guide is the posterior, in float64: every weight is the evidence, and the verdict is "exact"."""
    torch.set_default_dtype(torch.float64)
    x = torch.tensor([0.3, 0.9, -0.5])

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("row", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(x.sum() / 4, 0.5))

    truth = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(x)
    verdict = dgm.khat(dgm.from_svi(model, guide, x, prior=0))
    assert verdict.status == "exact" and abs(verdict.log_evidence - truth) < 1e-4 and verdict.k == -np.inf


# --- Subsamples ------------------------------------------------------------------------------------------------------


def locals_model(x, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.deterministic("twice", 2.0 * z)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])


@pytest.mark.parametrize("parallel", ["auto", False])
def test_d1_subsampling(parallel):
    """Ten rows, four at a time (so that the last round overlaps): every density is that of the full data.

    A new subsample for every draw, the fault, gives k-hat above 4 where the truth is 0.2.
    """
    model = lambda x: locals_model(x, 4)
    guide = AutoNormal(model, create_plates=lambda x: pyro.plate("data", len(x), subsample_size=4))
    idata = export(model, guide, X, num_samples=40, prior=10, parallel=parallel, coords={"data": list("abcdefghij")})
    draws = draws_of(idata, "mu", "z")
    full = from_posterior_samples(locals_model, draws, X, prior=0)
    for a, b in ((idata, full),):
        np.testing.assert_allclose(a.sample_stats.lp, b.sample_stats.lp, atol=1e-4)
        np.testing.assert_allclose(a.log_likelihood.x, b.log_likelihood.x, atol=1e-6)
    log_q = sum(
        dist.Normal(getattr(guide.locs, k), getattr(guide.scales, k)).log_prob(v).reshape(40, -1).sum(-1)
        for k, v in draws.items()
    )
    np.testing.assert_allclose(idata.sample_stats.log_q.values[0], log_q.detach(), atol=1e-4)
    np.testing.assert_array_equal(idata.observed_data.x, X)
    np.testing.assert_allclose(idata.posterior.twice, 2.0 * idata.posterior.z)
    assert idata.posterior.z.dims == ("chain", "draw", "data") and idata.prior_predictive.x.shape == (1, 10, 10)


def test_global_latents_and_a_subsampled_plate_give_full_data_weights():
    def model(x, size=3):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=size) as i:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[i])

    pyro.set_rng_seed(1)
    guide = lambda x, size=3: pyro.sample("mu", dist.Normal(x.sum() / 11, 11**-0.5))  # the exact posterior
    weights = export(model, guide, X, prior=0).sample_stats.log_weight.values
    truth = dist.MultivariateNormal(torch.zeros(10), torch.eye(10) + 1.0).log_prob(X)
    np.testing.assert_allclose(weights, truth, atol=1e-4)


def test_subsamples_whose_rows_cannot_be_visited_are_refused():
    def batch(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=10):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(
        ValueError, match="Plate 'data' is subsampled, and the data of site 'x' do not follow its index"
    ):
        export(batch, AutoNormal(batch), X)

    def own_index(x):
        z, i = pyro.sample("z", dist.Normal(0.0, 1.0)), torch.arange(5)
        with pyro.plate("data", 10, subsample=i):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    with pytest.raises(
        ValueError, match="Plate 'data' is subsampled by subsample=, so its other rows cannot be reached"
    ):
        export(own_index, AutoNormal(own_index), X)

    def crossed():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("a", 6, subsample_size=3, dim=-2) as i, pyro.plate("b", 4, subsample_size=2, dim=-1) as j:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(6, 4)[i][:, j])

    with pytest.raises(ValueError, match=r"Site 'x' lies in 2 subsampled plates \((a, b|b, a)\)"):
        export(crossed, AutoNormal(crossed))


# --- Discrete sites --------------------------------------------------------------------------------------------------

WEIGHTS, LOCS = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0])


def mixture(y, size=None):
    loc = pyro.sample("loc", dist.Normal(LOCS, 0.3).to_event(1))
    with pyro.plate("row", len(y), subsample_size=size) as i:
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(Vindex(loc)[..., k], 1.0), obs=y[i])


@pytest.mark.parametrize("size, parallel", [(None, "auto"), (None, False), (4, "auto")])
def test_d2_enumerated(size, parallel):
    """log_likelihood is the log-sum-exp over classes; classes are drawn from their posterior, not (P12) from the prior."""
    y = torch.tensor([-1.2, 2.1, 0.5, 3.0, -0.3])
    guide = dgm.AutoFlow(lambda y: mixture(y))
    n = 2_000 if parallel == "auto" else 100
    idata = export(lambda y: mixture(y, size), guide, y, num_samples=n, prior=0, check=False, parallel=parallel)
    loc = draws_of(idata, "loc")["loc"]
    joint = WEIGHTS.log() + dist.Normal(loc[:, None], 1.0).log_prob(y[:, None])
    np.testing.assert_allclose(idata.log_likelihood.y.values[0], joint.logsumexp(-1), atol=1e-5)
    lp = joint.logsumexp(-1).sum(-1) + dist.Normal(LOCS, 0.3).log_prob(loc).sum(-1)
    np.testing.assert_allclose(idata.sample_stats.lp.values[0], lp, atol=1e-4)
    assert idata.posterior.k.dims == ("chain", "draw", "row")
    error = idata.posterior.k.values[0].mean(0) - joint.softmax(-1)[..., 1].mean(0).numpy()
    assert np.abs(error).max() < (0.02 if n > 100 else 0.15) * 1.6  # two per cent, and the error of 2,000 draws


def test_rows_that_share_a_class_have_one_likelihood():
    """Two observed sites of one class: their joint row; a whole chain of classes in a plate of sequences, by brute force."""

    def model(a, b):
        loc = pyro.sample("loc", dist.Normal(LOCS, 0.3).to_event(1))
        with pyro.plate("row", 3):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("a", dist.Normal(Vindex(loc)[..., k], 1.0), obs=a)
            pyro.sample("b", dist.Normal(Vindex(loc)[..., 1 - k], 1.0), obs=b)

    a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, -1.0])
    idata = export(model, dgm.AutoFlow(model), a, b, num_samples=30, prior=0, check=False)
    loc = draws_of(idata, "loc")["loc"][:, None]
    joint = (
        WEIGHTS.log() + dist.Normal(loc, 1.0).log_prob(a[:, None]) + dist.Normal(loc.flip(-1), 1.0).log_prob(b[:, None])
    )
    np.testing.assert_allclose(idata.log_likelihood.a_b.values[0], joint.logsumexp(-1), atol=1e-5)
    assert idata.log_likelihood.a_b.dims == ("chain", "draw", "row")


def test_chains_of_classes():
    """A hidden Markov model for each of two sequences, against the sum over all 8 paths."""
    y, move = torch.tensor([[0.0, 1.0, 2.0], [1.5, -1.0, 0.3]]), torch.tensor([[0.8, 0.2], [0.4, 0.6]])

    def model():
        loc = pyro.sample("loc", dist.Normal(LOCS, 0.3).to_event(1))
        with pyro.plate("sequence", 2):
            k = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(3)):
                k = pyro.sample(f"k{t}", dist.Categorical(move[k]), infer={"enumerate": "parallel"})
                pyro.sample(f"y{t}", dist.Normal(Vindex(loc)[..., k], 1.0), obs=y[:, t])

    idata = export(model, dgm.AutoFlow(model), num_samples=5, prior=0, check=False)
    loc = draws_of(idata, "loc")["loc"]
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    prior = move[0, paths[:, 0]] * move[paths[:, 0], paths[:, 1]] * move[paths[:, 1], paths[:, 2]]
    terms = dist.Normal(loc[:, paths][:, None], 1.0).log_prob(y[:, None]).sum(-1)
    np.testing.assert_allclose(idata.log_likelihood.y0_y1_y2.values[0], (terms + prior.log()).logsumexp(-1), atol=1e-5)


def test_a_class_of_all_data_has_no_pointwise_likelihood_and_says_so():
    def model(y):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        loc = pyro.sample("loc", dist.Normal(LOCS, 0.3).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(Vindex(loc)[..., k], 1.0), obs=y)

    with pytest.warns(UserWarning, match=r"no log_likelihood of \['y'\], since a discrete site is summed out"):
        idata = export(model, dgm.AutoFlow(model), X, num_samples=50, prior=0, check=False)
    loc = draws_of(idata, "loc")["loc"]
    joint = WEIGHTS.log() + dist.Normal(loc[:, None], 1.0).log_prob(X[:, None]).sum(1)
    lp = joint.logsumexp(-1) + dist.Normal(LOCS, 0.3).log_prob(loc).sum(-1)
    np.testing.assert_allclose(idata.sample_stats.lp.values[0], lp, atol=1e-4)

    def subsampled(y):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        loc = pyro.sample("loc", dist.Normal(LOCS, 0.3).to_event(1))
        with pyro.plate("row", len(y), subsample_size=5) as i:
            pyro.sample("y", dist.Normal(Vindex(loc)[..., k], 1.0), obs=y[i])

    with pytest.raises(ValueError, match="Site 'y' lies in the subsampled plate 'row' and depends on a discrete site"):
        export(subsampled, dgm.AutoFlow(subsampled), X, num_samples=50, prior=0, check=False)


# --- Masks and missing data ------------------------------------------------------------------------------------------


def test_d3_masks():
    """P14, P15: what a mask hides or is NaN is no datum for loo, and the rest keeps its labels."""
    keep = torch.tensor([True, True, False, True, False, True])
    holes = torch.where(keep, DATA[:, 0], torch.nan)

    def masked(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6), poutine.mask(mask=keep):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def by_distribution(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(z, 1.0).mask(keep), obs=x)

    def with_nan(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.NanMaskedNormal(z, 1.0), obs=x)

    for model, x in ((masked, DATA[:, 0]), (by_distribution, DATA[:, 0]), (with_nan, holes)):
        pyro.clear_param_store()
        idata = export(model, AutoNormal(model), x, coords={"data": list("abcdef")})
        z = draws_of(idata, "z")["z"][:, None]
        np.testing.assert_allclose(
            idata.log_likelihood.x.values[0], dist.Normal(z, 1.0).log_prob(DATA[keep, 0]), atol=1e-5
        )
        assert idata.log_likelihood.x.dims[-1] == "x_seen" and "".join(idata.log_likelihood.x_seen.values) == "abdf"
        assert dgm.loo(idata).n_data_points == 4


def test_latents_of_observed_data_do_not_enter_the_weights():
    """P16: obs_mask makes latents that mean nothing where data are; the exact guide has k-hat "exact" only without them."""
    keep = torch.tensor([True, False, True, True])

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=keep)

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(x[keep].sum() / 4, 0.5))
        with pyro.plate("row", 4):  # right where the datum is missing, far off where it is not
            pyro.sample("x_unobserved", dist.Normal(torch.where(keep, torch.tensor(7.0), mu[..., None] if mu.dim() else mu),
                                                    torch.where(keep, torch.tensor(11.0), 1.0)))  # fmt: skip

    x = torch.tensor([0.5, 0.0, 1.0, -0.2])
    idata = export(model, guide, x, prior=0)
    truth = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(x[keep])
    np.testing.assert_allclose(idata.sample_stats.log_weight, truth, atol=1e-4)
    with pytest.raises(
        ValueError, match="latent site 'x_unobserved' is masked in part.*AutoDiagonalNormal has one density"
    ):
        export(model, AutoDiagonalNormal(model), x)


# --- Models that do not broadcast, and all guides ----------------------------------------------------------------------


def test_d5_wrong_vectorisation():
    """``b.sum()`` adds the draws up in a plate; torch.vmap of single runs gives the right values, without a warning."""

    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(b.sum(), 1.0), obs=y)

    def branching(y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(b.sum() if float(b.sum()) > -1e9 else b, 1.0), obs=y)

    idata = export(model, AutoNormal(model), X)
    with pytest.warns(UserWarning, match="cannot run many draws at once"):
        looped = export(branching, AutoNormal(branching), X, num_samples=20, prior=5)
    for made in (idata, looped):
        total = draws_of(made, "b")["b"].sum(-1, keepdim=True)
        np.testing.assert_allclose(made.log_likelihood.y.values[0], dist.Normal(total, 1.0).log_prob(X), atol=1e-5)
        assert made.posterior_predictive.y.std("draw").min() > 0.5 and made.prior_predictive.y.shape[2] == 10


def test_vmap_is_fast_and_gives_up_where_a_sampler_cannot():
    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", Stubborn(b.sum(), 1.0), obs=y)

    class Stubborn(dist.Normal):
        def rsample(self, sample_shape=()):
            return super().rsample(sample_shape) + 0.0 * float(super().rsample(sample_shape).sum())

    with pytest.warns(UserWarning, match="cannot run many draws at once"):
        idata = export(model, AutoNormal(model), X, num_samples=30, prior=0)
    assert idata.posterior_predictive.y.std("draw").min() > 0.5


def test_a_warning_of_slow_draws_tells_what_is_wrong_with_the_plate():
    """A mixture with a dimension too many: its density runs under vmap, its sampler does not, and torch says setup_context.

    Planted: what vmap said of the sampler; a deterministic site's fault that is not kept while vmap is tried.
    """

    def mixture(y):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        m = pyro.sample("m", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        with pyro.plate("row", len(y)):
            parts = dist.Categorical(w[..., None, :]), dist.Normal(m[..., None, :], 1.0)
            pyro.sample("y", dist.MixtureSameFamily(*parts), obs=y)

    def computed(y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.deterministic("total", b.sum() if float(b[..., 0].detach().sum()) > -1e9 else b)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=y)

    for model, said in ((mixture, "draws run together"), (computed, "site 'total' of draws run together")):
        with pytest.warns(UserWarning, match=rf"many draws at once \([^)]*{said}") as found:
            export(model, AutoNormal(model), X, num_samples=20, prior=5)
        assert not any("setup_context" in str(w.message) or "vmap" in str(w.message) for w in found)


@pytest.mark.parametrize("masked", [False, True])
def test_d7_autodelta_and_implicit_guides(masked):
    """No density, no weights: refused by name, or draws and predictions only; also where a mask stands around the site."""
    with pytest.raises(ValueError, match="AutoDelta is a point estimate"):
        export(conjugate, autoguide.AutoDelta(conjugate), DATA)

    def implicit(x):
        z = dgm.ImplicitDistribution(lambda e: e + 0.1, dist.Normal(torch.zeros(2), 1.0).to_event(1), 2)
        pyro.sample("z", z.mask(True) if masked else z)

    idata = export(conjugate, implicit, DATA)
    assert set(idata.sample_stats.data_vars) == {"lp"} and idata.posterior_predictive.x.shape == (1, 300, 6, 2)
    with pytest.raises(ValueError, match="khat: sample_stats has no log_weight"):
        dgm.khat(idata)
    with pytest.raises(ValueError, match="loo: sample_stats has no log_q"):
        dgm.loo(idata)
    assert np.isfinite(elpd_of(dgm.loo(idata, correct=False)))

    def gan(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample(
            "x", dgm.ImplicitDistribution(lambda e: e + z, dist.Normal(torch.zeros(2), 1.0).to_event(1), 2), obs=x
        )

    with pytest.warns(UserWarning, match=r"no log_likelihood of \['x'\], since they have no density"):
        idata = export(gan, AutoNormal(lambda x: conjugate()), DATA[0])
    assert set(idata.sample_stats.data_vars) == {"log_q"} and not has_group(idata, "log_likelihood")


GUIDES = ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "AutoIAFNormal",
          "AutoStructured", "AutoGaussian"]  # fmt: skip


@pytest.mark.parametrize("name", [*GUIDES, "AutoFlow", "two modes"])
def test_d9_all_autoguides(name):
    """From the weights of each guide: the evidence of a conjugate model, or a gap above the ELBO."""

    def model(x=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 6):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)
            pyro.sample("y", dist.Normal(b, 1.0), obs=DATA[:, 1])

    guide = (
        dgm.AutoFlow(model, init_scale=0.4) if name in ("AutoFlow", "two modes") else getattr(autoguide, name)(model)
    )
    guide(DATA[:, 0])
    if name == "two modes":
        guide._posterior.grow(2)
    steps = {"AutoFlow": 0, "two modes": 0}.get(name, 60)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    for _ in range(steps):
        svi.step(DATA[:, 0])
    v = dgm.khat(export(model, guide, DATA[:, 0], num_samples=1_000, prior=0, check=False))
    assert v.log_evidence - 4 * v.log_evidence_error - 0.2 < EVIDENCE < v.log_evidence + 4 * v.log_evidence_error + 0.2
    assert v.elbo < EVIDENCE + 4 * v.elbo_error


# --- Cost ------------------------------------------------------------------------------------------------------------


def test_f1_speed():
    """4,000 draws together at least 50 times faster than one by one (400 times in the benchmark)."""
    guide = AutoNormal(eight_schools)
    guide(ERROR, EFFECT)
    cost = {}
    for parallel, n in (("auto", 4_000), (False, 40)):
        start = time.process_time()
        export(
            eight_schools,
            guide,
            ERROR,
            EFFECT,
            num_samples=n,
            prior=n,
            parallel=parallel,
            check=False,
            container="dict",
        )
        cost[parallel] = (time.process_time() - start) / n
    assert cost[False] > 50 * cost["auto"], cost


def test_f2_memory():
    """Batches of 70 draws give what all 300 at once give, under one seed."""
    guide = AutoNormal(eight_schools)
    whole, parts = (export(eight_schools, guide, ERROR, EFFECT, batch_size=b) for b in (None, 70))
    for group in ("posterior", "sample_stats", "log_likelihood"):
        for name in whole[group].data_vars:
            np.testing.assert_allclose(whole[group][name], parts[group][name], rtol=1e-6, atol=1e-5)
    assert parts.posterior_predictive.effect.shape == (1, 300, 8)


def test_an_amortised_guide_with_local_latents():
    """A linear VAE of 200 rows: exact weights from an encoder; local latents and pixels need not be kept."""
    w, noise = torch.tensor([[1.0], [0.5], [-1.0]]), 0.5
    x = torch.randn(200, 3)
    precision = 1.0 + (w.T @ w).item() / noise**2

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T, noise).to_event(1), obs=x, infer={"event_dims": ["pixel"]})

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ w / noise**2 / precision, precision**-0.5).to_event(1))

    idata = export(model, guide, x, prior=0, sites=[], batch_size=100, num_samples=200)
    evidence = dist.MultivariateNormal(torch.zeros(3), w @ w.T + noise**2 * torch.eye(3)).log_prob(x).sum()
    np.testing.assert_allclose(idata.sample_stats.log_weight, evidence, rtol=1e-5)
    assert not has_group(idata, "posterior") and idata.posterior_predictive.x.dims == ("chain", "draw", "data", "pixel")
    with pytest.raises(ValueError, match=r"sites=\['zz'\]: \['zz'\] are no latent or deterministic sites"):
        export(model, guide, x, sites=["zz"])


def test_warnings_are_raised_by_no_ordinary_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(eight_schools, AutoNormal(eight_schools), ERROR, EFFECT)


def test_a_deterministic_site_that_adds_the_draws_up_is_seen():
    """The log joint is right in a plate, ``b.sum()`` in a deterministic site is not: vmap gives the draw's own."""

    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.deterministic("total", b.sum())

    idata = export(model, AutoNormal(model))
    np.testing.assert_allclose(idata.posterior.total, idata.posterior.b.sum("b_dim_0"), atol=1e-5)
    np.testing.assert_allclose(idata.prior.total, idata.prior.b.sum("b_dim_0"), atol=1e-5)


def test_a_posterior_of_discrete_sites_alone():
    def model(y):
        with pyro.plate("row", len(y)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(LOCS[k], 1.0), obs=y)

    y = torch.tensor([-1.0, 0.5])
    idata = export(model, lambda y: None, y, num_samples=2_000, prior=0)
    joint = WEIGHTS.log() + dist.Normal(LOCS, 1.0).log_prob(y[:, None])
    assert np.abs(idata.posterior.k.values[0].mean(0) - joint.softmax(-1)[:, 1].numpy()).max() < 0.04
    np.testing.assert_allclose(idata.sample_stats.log_weight, joint.logsumexp(-1).sum(), atol=1e-4)
    assert dgm.khat(idata).status == "exact"


def test_a_loop_over_a_subsample_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", 10, subsample_size=3):
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    with pytest.raises(ValueError, match="lies in plate 'data', a loop over a subsample"):
        export(model, AutoNormal(model), X)


def test_what_is_not_broadcast_to_its_plate():
    """P8: one observed number for a plate of three, and a deterministic scalar inside of it."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.deterministic("twice", 2.0 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    idata = export(model, AutoNormal(model))
    assert idata.log_likelihood.y.dims == ("chain", "draw", "row") and idata.posterior_predictive.y.shape == (1, 300, 3)
    np.testing.assert_array_equal(idata.observed_data.y, np.full(3, 0.5))
    np.testing.assert_allclose(idata.posterior.twice, 2.0 * idata.posterior.z)


def test_a_list_of_guides_may_hold_a_function():
    def model(x):
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    guide = autoguide.AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["b"])))
    guide.append(lambda x: {"b": pyro.sample("b", dist.Normal(0.2, 0.8))})
    idata = export(model, guide, torch.tensor(1.0), num_samples=2_000, prior=0)
    b = draws_of(idata, "b")["b"]
    a = draws_of(idata, "a")["a"]
    part = guide[0]
    log_q = dist.Normal(part.locs.a, part.scales.a).log_prob(a) + dist.Normal(0.2, 0.8).log_prob(b)
    np.testing.assert_allclose(idata.sample_stats.log_q.values[0], log_q.detach(), atol=1e-4)
    assert b.std() > 0.7


def test_hidden_sites_of_a_class_are_conditioned_on():
    """h and y share a class: log p(y | h) = log p(y, h) - log p(h), both summed over the class."""

    def model(y):
        with pyro.plate("row", 3):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            h = pyro.sample("h", dist.Normal(2.0 * k.float(), 1.0))
            pyro.sample("y", dist.Normal(h + k.float(), 1.0), obs=y)

    y = torch.tensor([0.3, 2.0, 1.0])
    idata = export(model, AutoNormal(poutine.block(model, hide=["k"])), y, num_samples=40, prior=0, check=False)
    h = draws_of(idata, "h")["h"]
    hidden = torch.stack([WEIGHTS.log()[k] + dist.Normal(2.0 * k, 1.0).log_prob(h) for k in (0, 1)])
    both = hidden + torch.stack([dist.Normal(h + k, 1.0).log_prob(y) for k in (0, 1)])
    np.testing.assert_allclose(idata.log_likelihood.y.values[0], both.logsumexp(0) - hidden.logsumexp(0), atol=1e-5)
    np.testing.assert_allclose(idata.sample_stats.lp.values[0], both.logsumexp(0).sum(-1), atol=1e-4)


def test_a_class_of_a_group_gives_the_group_one_likelihood():
    """k per group, data per group and item: the datum of leave-one-out is the group; predictions keep both plates."""

    def model(y):
        with pyro.plate("group", 3, dim=-2):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("item", 4, dim=-1):
                pyro.sample("y", dist.Normal(mu + k.float(), 1.0), obs=y)

    y = torch.randn(3, 4)
    idata = export(model, AutoNormal(poutine.block(model, hide=["k"])), y, num_samples=40, prior=7, check=False)
    mu = draws_of(idata, "mu")["mu"][..., None]
    terms = [WEIGHTS.log()[k] + dist.Normal(mu + k, 1.0).log_prob(y).sum(-1) for k in (0, 1)]
    np.testing.assert_allclose(idata.log_likelihood.y.values[0], torch.stack(terms).logsumexp(0), atol=1e-5)
    assert idata.log_likelihood.y.dims[2:] == ("group",) and idata.posterior_predictive.y.dims[2:] == ("group", "item")
    assert idata.posterior.k.shape == (1, 40, 3) and idata.prior.k.shape == (1, 7, 3)


def test_an_amortised_guide_in_a_subsampled_plate():
    """Local latents from each row's own data, an inner plate, and a global draw that all rounds share."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=4, dim=-2) as i:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            with pyro.plate("time", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(0.3, 0.2))
        with pyro.plate("data", len(x), subsample_size=4, dim=-2) as i:
            pyro.sample("z", dist.Normal(0.5 * x[i].mean(-1, keepdim=True) + 0.1 * mu, 0.5))

    x = torch.randn(10, 3)
    idata = export(model, guide, x, num_samples=40, prior=0)
    mu, z = draws_of(idata, "mu", "z").values()
    locs = 0.5 * x.mean(-1) + 0.1 * mu[:, None]
    log_q = dist.Normal(0.3, 0.2).log_prob(mu) + dist.Normal(locs, 0.5).log_prob(z).sum(-1)
    lp = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu[:, None], 1.0).log_prob(z).sum(-1)
    lp = lp + dist.Normal(z[..., None], 1.0).log_prob(x).sum((-1, -2))
    np.testing.assert_allclose(idata.sample_stats.log_q.values[0], log_q, atol=1e-4)
    np.testing.assert_allclose(idata.sample_stats.lp.values[0], lp, atol=1e-3)


def test_batch_dimensions_outside_of_plates():
    """Pyro's own bounds refuse them, draws do not: three independent latents and data without a plate."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    idata = export(model, AutoNormal(model), X[:3], check=False)
    mu = draws_of(idata, "mu")["mu"]
    np.testing.assert_allclose(idata.log_likelihood.x.values[0], dist.Normal(mu, 1.0).log_prob(X[:3]), atol=1e-5)


def test_masked_data_of_a_subsampled_plate_under_vmap():
    """The mask follows the index, the model does not broadcast: the right data are left out."""
    keep = torch.tensor([True, True, False, True, False, True, True, False, True, True])

    def model(x):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", 10, subsample_size=4) as i, poutine.mask(mask=keep[i]):
            pyro.sample("x", dist.Normal(b.sum(), 1.0), obs=x[i])

    idata = export(model, AutoNormal(model), X, coords={"data": list("abcdefghij")}, num_samples=40)
    total = draws_of(idata, "b")["b"].sum(-1, keepdim=True)
    np.testing.assert_allclose(idata.log_likelihood.x.values[0], dist.Normal(total, 1.0).log_prob(X[keep]), atol=1e-5)
    assert "".join(idata.log_likelihood.x_seen.values) == "abdfgij"
