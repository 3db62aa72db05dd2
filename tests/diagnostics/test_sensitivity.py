"""How much prior and data decide, by ArviZ, and what of that is chance; ranks of data among leave-one-out predictions."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.diagnostics.containers import add_groups, group, has_group, uniform_by_ks, uniform_p
from pyro_dgm.diagnostics.loo import loo_pit
from pyro_dgm.diagnostics.sensitivity import CONFLICT, STRONG, power_scaling


def model(x, scale):
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    with pyro.plate("item", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def page_of(x, scale, width=1.0):
    precision = scale**-2 + len(x)
    start = pyro.infer.autoguide.init_to_value(values={"mu": x.sum() / precision})
    guide = dgm.AutoFlow(model, init_loc_fn=start, init_scale=width * precision**-0.5).setup(x, scale)
    return dgm.check(dgm.from_svi(model, guide, x, scale, seed=0, num_samples=1_000))


def test_weak_strong_and_contradicted_priors_are_told_apart(tmp_path):
    """Closed form: CJS distances of the scaled normals, per doubling. With the prior and the likelihood exchanged it fails."""
    x = torch.linspace(-1.5, 1.5, 10)
    weak, strong, against = page_of(x, 10.0), page_of(x, 0.05), page_of(x + 3.0, 0.3)
    assert weak.sensitivity.diagnoses == {} and "Use it. A fault" in str(weak)
    assert strong.sensitivity.diagnoses == {"mu": STRONG} and "Use it if the prior of mu was meant" in str(strong)
    assert against.sensitivity.diagnoses == {"mu": CONFLICT} and "conflict (sensitivity to the prior" in str(against)
    assert strong.sensitivity.prior["mu"] == pytest.approx(
        0.085, abs=0.03
    )  # closed form, in the range of so many draws
    assert strong.sensitivity.likelihood["mu"] == pytest.approx(0.002, abs=0.004)
    strong.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_what_is_chance_is_not_said():
    """Of ten latents with flat priors beside 50 with strong ones ArviZ's 0.05 flags most, by the noise of the weights."""
    rng = np.random.default_rng(0)
    z, flat = rng.normal(size=(1, 1_000, 50)), rng.normal(size=(1, 1_000, 10))
    densities = {"z": -0.5 * (z**2).sum(-1), "flat": 0.0 * flat[..., 0]}
    groups = {"posterior": {"z": z, "flat": flat}, "log_prior": densities, "log_likelihood": {"y": -0.5 * flat**2}}
    found = power_scaling({"groups": groups}, None)
    assert sum(found.prior[f"flat[{i}]"] > 0.05 for i in range(10)) >= 5
    assert (
        not [k for k in found.diagnoses if k.startswith("flat")] and "cannot be told from chance" in found.lines()[-1]
    )


def test_draws_that_are_off_are_resampled_or_refused():
    x = torch.linspace(1.5, 4.5, 10)
    wide, lost = page_of(x, 0.3, width=1.6), page_of(x, 0.3, width=0.2)
    assert wide.verdict.status == "usable" and wide.sensitivity.diagnoses == {"mu": CONFLICT}
    assert wide.sensitivity.prior["mu"] == pytest.approx(page_of(x, 0.3).sensitivity.prior["mu"], rel=0.25)
    assert lost.verdict.status == "bad" and "not the posterior's" in lost.sensitivity.missing
    assert lost.sensitivity.lines()[0] in str(lost)


def test_priors_inside_of_plates_are_left_alone():
    def hierarchy(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(x)):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    x = torch.linspace(-1.0, 1.0, 5)
    draws = {"mu": torch.randn(100), "theta": torch.randn(100, 5)}
    idata = dgm.from_posterior_samples(hierarchy, draws, x, prior=0)
    assert group(idata, "log_prior")["theta"].shape == (1, 100, 5)
    assert dgm.check(idata).sensitivity.scaled == ("mu",) and list(dgm.check(idata).sensitivity.prior) == ["mu"]
    alone = dgm.from_posterior_samples(hierarchy, draws, x, prior=0, sites=["mu"])
    assert set(group(alone, "log_prior")) == {"mu"}
    bare = dgm.from_posterior_samples(hierarchy, draws, x, prior=0, log_prior=False)
    assert not has_group(bare, "log_prior") and "needs log_prior" in str(dgm.check(bare))
    impossible = add_groups(bare, {"log_prior": {"mu": np.full((1, 100), -np.inf)}}, {}, {})
    assert "infinite at a draw" in str(dgm.check(impossible))


# --- Ranks of data among leave-one-out predictions ---


def known_scale(x=None, n=100):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("item", n):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def exact_page(x):
    precision = len(x) + 1.0 / 9.0
    guide = lambda x=None, n=100: pyro.sample("mu", dist.Normal(float(x.nansum() / precision), precision**-0.5))
    return dgm.check(dgm.from_svi(known_scale, guide, x, len(x), seed=0, num_samples=500, prior=0))


def test_predictions_that_are_too_narrow_too_wide_or_right_are_told_apart(tmp_path):
    """Quantiles of normals as data: the ranks are those of their own spread. Weights of the wrong sign move the last one's."""
    quantiles = dist.Normal(0.0, 1.0).icdf((torch.arange(100) + 0.5) / 100)
    right, narrow, wide = (exact_page(s * quantiles) for s in (1.0, 2.0, 0.5))
    assert right.pit_p["x"] > 0.2 and "uniform, as they should be" in str(right) and not right.misfits
    assert narrow.pit_p["x"] < 0.01 and "spread of x (predictions are too narrow)" in narrow.misfits
    assert wide.pit_p["x"] < 0.01 and "predictions are too wide" in str(wide) and "Change the model" in str(wide)
    narrow.picture(tmp_path / "page.png")
    exact = dist.Normal(0.0, (1.0 + 1.0 / 99.0) ** 0.5).cdf(quantiles + quantiles / 99.0)
    assert np.abs(right.pit["x"] - exact.numpy()).max() < 0.07


def test_a_datum_of_its_own_latent_is_predicted_without_it():
    """Two rows, of which one decides most of its latent: closed form, far from the rank among plain predictions."""
    rng = np.random.default_rng(0)
    mu = rng.normal(1.0, 0.5**0.5, size=4_000)
    ll = dist.Normal(torch.tensor(mu), 1.0).log_prob(torch.tensor(2.0)).numpy()
    groups = {
        "posterior": {"mu": mu[None]},
        "log_likelihood": {"x": ll[None, :, None]},
        "observed_data": {"x": np.array([2.0])},
    }
    groups |= {"posterior_predictive": {"x": (mu + rng.normal(size=4_000))[None, :, None]}, "sample_stats": {}}
    left_out = dist.Normal(0.0, 2.0**0.5).cdf(torch.tensor(2.0)).item()
    assert loo_pit({"groups": groups}, "x")[0] == pytest.approx(left_out, abs=0.03)
    assert abs((groups["posterior_predictive"]["x"] <= 2.0).mean() - left_out) > 0.1


def test_whole_numbers_gaps_and_images():
    """Counts of a Poisson have uniform ranks only with a uniform number added; a gap has none; images are left out."""
    rng = np.random.default_rng(1)
    y, new = rng.poisson(0.7, 400).astype(float), rng.poisson(0.7, (1, 500, 400)).astype(float)
    groups = {
        "log_likelihood": {"y": np.zeros((1, 500, 400))},
        "posterior_predictive": {"y": new},
        "observed_data": {"y": y},
    }
    groups["sample_stats"] = {}
    pit = loo_pit({"groups": groups}, "y")
    assert len(pit) == 400 and uniform_p(pit, uniform_by_ks) > 0.05 and abs(pit.mean() - 0.5) < 0.05
    y[:3] = np.nan
    groups["log_likelihood"]["y"] = np.zeros((1, 500, 397))
    assert len(loo_pit({"groups": groups}, "y")) == 397
    groups["log_likelihood"]["y"] = np.zeros((1, 500, 20))
    assert len(loo_pit({"groups": groups}, "y")) == 0
