"""Calibration against a conjugate posterior and planted faults; bounds on errors; R-hat of iterates."""

import pathlib

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

import pyro_dgm as dgm
from pyro_dgm.core.weights import arviz_major
from pyro_dgm.diagnostics import Refit
from pyro_dgm.diagnostics.calibration import _by_chi2, _p_values, ranks
from pyro_dgm.diagnostics.containers import group, has_group
from pyro_dgm.diagnostics.sharpness import _crps, _crps_of_all

PRIOR = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
POSTERIOR = torch.linalg.inv(torch.linalg.inv(PRIOR) + 2.0 * torch.eye(2))


def model(x=None):
    """A plane normal: t ~ N(0, PRIOR), x | t ~ N(t, I / 2)."""
    t = pyro.sample("t", dist.MultivariateNormal(torch.zeros(2), PRIOR))
    pyro.sample("x", dist.MultivariateNormal(t, 0.5 * torch.eye(2)), obs=x)


class Amortised:
    """The exact posterior for any x, with a planted fault: sd times ``scale``, mean off by ``bias`` sd."""

    def __init__(self, scale=1.0, bias=0.0):
        self.scale, self.bias = scale, bias

    def condition(self, x):
        loc = POSTERIOR @ (2.0 * x) + self.bias * POSTERIOR.diagonal().sqrt()
        return Conditioned(dist.MultivariateNormal(loc, self.scale**2 * POSTERIOR))


class Conditioned:
    def __init__(self, q):
        self.q = q

    def sample(self, sample_shape):
        return {"t": self.q.sample(sample_shape)}

    def log_prob(self, values):
        return self.q.log_prob(values["t"])


def draws_only(posterior, n=199):
    """The same posterior as a plain function, without a density."""
    return lambda data: posterior.condition(**data).sample((n,))


def test_e2_sbc():
    """300 simulations x 199 draws: the exact posterior passes, three planted faults do not, and are called by name."""
    exact = dgm.sbc(model, Amortised(), observed=["x"], seed=0)
    assert exact.p_value > 0.01 and exact.calibrated and "No fault was found" in str(exact)
    faults = {"narrow": Amortised(0.7), "wide": Amortised(1.4), "high": Amortised(1.0, 0.5)}
    for name, posterior in faults.items():
        result = dgm.sbc(model, posterior, observed=["x"], seed=0)
        assert result.p_value < 1e-4 and f"draws are too {name}" in str(result), str(result)


def test_sbc_keeps_its_level():
    """40 runs of 60 simulations with the exact posterior: about 1 % are rejected; a test that rejects half would be seen."""
    rejected = [
        not dgm.sbc(
            model, draws_only(Amortised(), 39), observed=["x"], num_simulations=60, num_draws=39, seed=i
        ).calibrated
        for i in range(40)
    ]
    assert sum(rejected) <= 3


def test_the_test_of_uniformity_keeps_its_level_and_sees_a_narrow_posterior():
    """300 sets of 300 ranks: of exact ones 1 % are rejected at 1 %; of sds .8 times too small nearly all. Of either ArviZ."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(300, 300))
    rejected = {}
    for scale in (1.0, 0.8):
        pit = np.stack([ranks(scale * rng.normal(size=(300, 99)), t, rng) for t in truth], 1)
        rejected[scale] = float((_p_values(pit, _by_chi2) < 0.01).mean())
    assert rejected[1.0] <= 0.03 and rejected[0.8] > 0.6, rejected


def test_number_and_picture_agree():
    """Of ArviZ 1.x the p-value is that of ``plot_ecdf_pit``; 0.x has none, and chi-square stays."""
    result = dgm.sbc(model, Amortised(0.85), observed=["x"], seed=0)
    if arviz_major() == 0:
        assert result.p_values["t"][0] == _by_chi2(result.pit["t"][:, 0])
        return
    drawn = result.container()["prior_sbc"].to_dataset().azstats.uniformity_test(dim=["chain", "draw"])[0]
    assert drawn["t"].values == pytest.approx(result.p_values["t"])


def test_e3_coverage_and_tarp():
    """Coverage sees a wrong scale at p < 1e-10, from the density or from the model's joint; TARP at p < 0.01."""
    for posterior in (Amortised(), draws_only(Amortised())):
        result = dgm.coverage(model, posterior, observed=["x"], seed=0)
        assert result.calibrated and abs(result.covered(0.8)[0] - 0.8) < 4 * result.covered(0.8)[1]
    for posterior in (Amortised(0.7), draws_only(Amortised(0.7))):
        result = dgm.coverage(model, posterior, observed=["x"], seed=0)
        assert result.p_value < 1e-10 and result.covered(0.8)[0] < 0.7 and "too small" in str(result)
    assert "too large" in str(dgm.coverage(model, Amortised(1.4), observed=["x"], seed=0))
    assert dgm.tarp(model, Amortised(), observed=["x"], seed=0).p_value > 0.01
    assert dgm.tarp(model, Amortised(0.7), observed=["x"], seed=0).p_value < 0.01
    far = lambda made: np.full_like(made.truth["t"], 10.0)  # from a corner, a bias changes every distance
    assert dgm.tarp(model, Amortised(1.0, 0.5), observed=["x"], references=far, seed=0).p_value < 1e-4


def test_a_guide_is_fitted_anew_to_every_simulation():
    """An exact "fit" passes and leaves the store alone; a mean field, too narrow under correlation 0.97, does not."""
    slope = torch.tensor([1.0, 0.95])

    def plane(x=None):
        t = pyro.sample("t", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((t * slope).sum(-1), 0.2), obs=x)

    precision = torch.eye(2) + slope[:, None] * slope / 0.04
    exact, narrow = torch.linalg.inv(precision), torch.diag(1.0 / precision.diagonal())

    def train(covariance):
        def fit(conditioned):
            x = pyro.poutine.trace(conditioned).get_trace().nodes["x"]["value"]
            loc = pyro.param("loc", exact @ slope * x / 0.04)
            return lambda: pyro.sample("t", dist.MultivariateNormal(loc, covariance))

        return fit

    results = [
        dgm.sbc(plane, Refit(plane, train(c)), observed=["x"], num_simulations=80, num_draws=49, seed=0)
        for c in (exact, narrow)
    ]
    assert results[0].calibrated and results[1].p_value < 1e-4 and not len(pyro.get_param_store())


def test_wrong_arguments_of_calibration_are_explained():
    with pytest.raises(ValueError, match=r"observed=\['z'\]: expected names of the model's data sites"):
        dgm.sbc(model, Amortised(), observed=["z"], num_simulations=3)
    with pytest.raises(ValueError, match=r"observed=\[\]: expected names"):
        dgm.sbc(model, Amortised(), num_simulations=3)
    with pytest.raises(TypeError, match="expected an object with .condition"):
        dgm.sbc(model, 3, observed=["x"], num_simulations=3)
    with pytest.raises(ValueError, match=r"The posterior returned \['u'\], none of which is a latent site"):
        dgm.sbc(model, lambda data: {"u": torch.zeros(5)}, observed=["x"], num_simulations=3, num_draws=5)
    with pytest.raises(ValueError, match=r"tarp: references has shape \(3,\), expected \(4, 2\)"):
        dgm.tarp(model, Amortised(), observed=["x"], num_simulations=4, references=lambda made: np.zeros(3))


def test_ranks_go_into_a_container():
    result = dgm.sbc(model, Amortised(), observed=["x"], num_simulations=30, num_draws=19, seed=0)
    made = result.container()
    assert has_group(made, "prior_sbc") and group(made, "prior_sbc")["t"].shape == (1, 30, 2)
    assert made["prior_sbc"].attrs["num_draws"] == 19


# --- Sharpness: what uniform ranks do not show -----------------------------------------------------------------------


class Prior(Amortised):
    """Planted: blind to the data."""

    def condition(self, x):
        return Conditioned(dist.MultivariateNormal(torch.zeros(2), PRIOR))


class HalfBlind(Amortised):
    """Planted: the exact posterior given the first datum alone."""

    def condition(self, x):
        gain = PRIOR[:, :1] / (PRIOR[0, 0] + 0.5)
        return Conditioned(dist.MultivariateNormal(gain[:, 0] * x[0], PRIOR - gain @ PRIOR[:1]))


class Wandering(Amortised):
    """Planted: the exact posterior, moved by 0.8 sd in a direction that follows the data as a sign does."""

    def condition(self, x):
        loc = POSTERIOR @ (2.0 * x) + 0.8 * torch.sin(40.0 * x).sign() * POSTERIOR.diagonal().sqrt()
        return Conditioned(dist.MultivariateNormal(loc, POSTERIOR))


def test_a_posterior_that_is_right_on_average_and_not_sharp_is_named():
    """Ranks of the first two are uniform: only sharpness sees them. KL by the normals' formula."""
    off = 0.32 * (torch.linalg.inv(POSTERIOR).diagonal() * POSTERIOR.diagonal()).sum()
    gain = 0.5 * torch.logdet(PRIOR) - 0.5 * torch.logdet(POSTERIOR)
    half = PRIOR - PRIOR[:, :1] @ PRIOR[:1] / (PRIOR[0, 0] + 0.5)
    gain_of_half = 0.5 * torch.logdet(half) - 0.5 * torch.logdet(POSTERIOR)
    for posterior, kl in ((Prior(), float(gain)), (HalfBlind(), float(gain_of_half)), (Wandering(), float(off))):
        for check in (dgm.sbc, dgm.coverage):
            result = check(model, posterior, observed=["x"], seed=0)
            lost = result.sharpness.lost
            assert result.calibrated or isinstance(posterior, Wandering)
            assert lost.value > 4 * lost.standard_error and lost.value < kl + 4 * lost.standard_error
            assert lost.value > 0.5 * kl and "Fault: the exact posterior is sharper by" in str(result)
    blind = dgm.sbc(model, Prior(), observed=["x"], seed=1).sharpness
    assert blind.read.value == pytest.approx(
        0.0, abs=4 * blind.read.standard_error
    ) and "no more than the prior" in str(blind)
    assert abs(blind.removed.value) < 4 * blind.removed.standard_error


def test_the_exact_posterior_has_no_fault_in_its_sharpness():
    """Its log score is minus its entropy, and nothing is lost; 40 seeds raise no false alarm."""
    exact = dgm.sbc(model, Amortised(), observed=["x"], seed=0).sharpness
    entropy = float(dist.MultivariateNormal(torch.zeros(2), POSTERIOR).entropy())
    assert abs(exact.log_q.value + entropy) < 4 * exact.log_q.standard_error
    assert abs(exact.lost.value) < 1e-4 and not exact.faults and exact.removed.value > 0.3
    options = {"num_simulations": 60, "num_draws": 49, "observed": ["x"]}
    near = Amortised(1.03)
    assert not any(dgm.sbc(model, near, seed=i, **options).sharpness.faults for i in range(15))


def test_draws_without_a_density_have_a_score_too():
    results = [dgm.sbc(model, draws_only(p), observed=["x"], seed=0).sharpness for p in (Amortised(), Prior())]
    assert results[0].log_q is None and results[0].lost is None and not results[0].faults
    assert results[0].removed.value > 0.3 and "no more than the prior" in str(results[1])


def test_data_that_say_nothing_are_no_fault_of_an_exact_posterior():
    def mute(x=None):
        pyro.sample("t", dist.MultivariateNormal(torch.zeros(2), PRIOR))
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    assert not dgm.sbc(mute, Prior(), observed=["x"], seed=0).sharpness.faults


def test_simulations_without_the_model_still_tell_a_blind_posterior():
    torch.manual_seed(0)
    t = dist.MultivariateNormal(torch.zeros(2), PRIOR).sample((300,))
    simulations = {"t": t, "x": t + 0.5**0.5 * torch.randn(300, 2)}
    made = {
        p: dgm.sbc(None, p, simulations=simulations, observed=["x"], seed=0).sharpness for p in (Amortised(), Prior())
    }
    exact, blind = made.values()
    assert exact.lost is None and not exact.faults and exact.read.value > 4 * exact.read.standard_error
    assert blind.faults and "does not read the data" in blind.faults[0]


def test_the_picture_says_verdict_and_axes(tmp_path, monkeypatch):
    """Planted: the title is the sharpness alone; there is no y label."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    for i, method in enumerate((dgm.sbc, dgm.coverage)):
        result = method(model, Prior(), observed=["x"], num_simulations=60, num_draws=49, seed=0)
        result.picture(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 10_000
        title = " ".join(figures[-1].get_suptitle().split())
        assert f"p = {result.p_value:.2g}" in title and "Sharpness" in title
        assert figures[-1].get_supylabel() == "ECDF minus uniform"


# --- Bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loc, scale", [(0.1, 1.0), (0.3, 0.9), (0.0, 0.8)])
def test_error_bounds_hold_and_are_right(loc, scale):
    """p = N(loc, scale^2), q = N(0, 1): D2 is known, and the bounds lie above the errors; half a bound, the fault, may not."""
    x = np.random.default_rng(0).normal(size=(1, 100_000))
    lw = -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) + 0.5 * x**2
    bounds = dgm.error_bounds({"groups": {"posterior": {"x": x}, "sample_stats": {"log_weight": lw}}})
    v = scale**2
    d2 = loc**2 / (2 - v) - np.log(scale) - 0.5 * np.log(2 - v)
    kl = 0.5 * (1 / v - 1 + loc**2 / v) + np.log(scale)
    assert abs(bounds.d2 - (d2 + 2 * kl)) < 0.02 + 0.05 * bounds.d2
    assert abs(loc) <= bounds.mean["x"] < 3 * abs(loc) + 0.6 and 1 - scale <= bounds.sd["x"]


def test_error_bounds_say_when_they_know_nothing():
    x = np.random.default_rng(0).normal(size=(1, 4_000))
    for s, words in ((4.0, "unknown"), (1.0, "small")):
        groups = {"posterior": {"x": x}, "sample_stats": {"log_weight": 0.5 * x**2 * (1 - 1 / s**2)}}
        bounds = dgm.error_bounds({"groups": groups})
        assert bounds.verdict == words and words in str(bounds) and np.isinf(bounds.mean["x"]) == (s == 4.0)
    with pytest.raises(ValueError, match="error_bounds: sample_stats has no log_weight"):
        dgm.error_bounds({"groups": {"sample_stats": {}, "posterior": {}}})


# --- Iterates ----------------------------------------------------------------------------------------------------------


def test_iterates_of_an_optimisation():
    """The page's code: R-hat of SVI's iterates falls below 1.1 once it has converged; their average is near the truth."""
    page = (pathlib.Path(__file__).parents[2] / "docs/howto/converged.md").read_text()
    code = page.split("```python")[1].split("```")[0]
    data = (torch.tensor([0.5, 1.0, 0.3]),)

    def target(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = pyro.infer.autoguide.AutoNormal(
        target, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"mu": torch.tensor(-3.0)})
    )
    svi = pyro.infer.SVI(target, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    svi.loss(target, guide, *data)
    names = {"svi": svi, "data": data, "guide": guide}
    exec(code.replace("1_200", "100"), names)
    assert names["rhat"] > 1.5
    exec(code, names)
    assert names["rhat"] < 1.1 and abs(guide.locs.mu.item() - 0.45) < 0.15


def test_the_prior_s_score_is_that_of_all_truths_as_draws():
    """With ties, a constant, and one row; planted fault: ranks from the right."""
    for truth in (np.random.default_rng(0).random(50), np.repeat([0.2, 0.7], 5), np.full(4, 0.3), np.array([0.5])):
        each = np.broadcast_to(truth, (len(truth), len(truth)))
        np.testing.assert_allclose(_crps_of_all(truth), _crps(each, truth), atol=1e-12)


def test_a_posterior_whose_log_prob_takes_other_values_is_ranked_all_the_same():
    class Own:
        def condition(self, **data):
            return self

        def sample(self, shape):
            return {"mu": torch.randn(shape)}

        def log_prob(self, value):
            return torch.distributions.Normal(0.0, 1.0).log_prob(value)

    def model(x=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(mu, 10.0), obs=x)

    result = dgm.sbc(model, Own(), observed=["x"], num_simulations=40, num_draws=19, seed=0)
    assert min(result.p_values.values()) > 0.001 and result.sharpness.log_q is None


@pytest.mark.parametrize("posterior, named", [(draws_only(Amortised(), 19), "posteriors"), (Amortised(), "joint")])
@pytest.mark.parametrize("check", [dgm.sbc, dgm.coverage, dgm.tarp])
def test_the_posteriors_are_counted_on_a_bar(check, posterior, named, capfd):
    """Planted fault: the bar is made and never moved."""
    options = {"observed": ["x"], "num_simulations": 20, "num_draws": 19, "seed": 0}
    check(model, posterior, progress=False, **options)
    assert capfd.readouterr().err == ""
    check(model, posterior, **options)
    last = capfd.readouterr().err
    assert "posteriors: " in last and "20/20" in last and named in last
