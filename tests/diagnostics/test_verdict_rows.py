"""Verdicts where one joint weight says nothing: rows of a plate, guides that were never fitted, and what to do next."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_dgm as dgm
import pyro_dgm.vae as parts

X = torch.linspace(-2.0, 2.0, 60)
EXACT = float(dist.Normal(0.0, 2.0**0.5).log_prob(X).sum())


def independent(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_scale(scale):
    def guide(x):
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    return guide


def hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_hierarchy(mu_scale, scale):
    """Exact at sqrt(1 / (1 + 60 / 2)) and sqrt(1 / 2), given the other."""

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(x.sum() / 2 / (1 + len(x) / 2), mu_scale))
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal((x + mu) / 2, scale))

    return guide


def exported(model, guide, **options):
    return dgm.from_svi(model, guide, X, **{"prior": 0, "seed": 0, "container": "dict"} | options)


@pytest.mark.parametrize("scale, status", [(0.5**0.5, "good"), (0.76, "good"), (1.2, "usable"), (0.3, "bad")])
def test_independent_rows_are_judged_each(scale, status):
    """60 rows, each off a little: all weights together are worth a few draws, each row's own nearly all.

    Planted: guides too wide and too narrow in every row, which stay "usable" and "bad".
    """
    verdict = dgm.khat(exported(independent, by_scale(scale)))
    assert verdict.status == status and verdict.independent and len(verdict.rows.k) == 60
    assert verdict.rows.fine == pytest.approx(1.0, abs=0.05) if status == "good" else verdict.rows.fine < 0.1
    assert "resample" not in str(verdict) and "plate 'row'" in str(verdict)
    if status != "bad":
        assert abs(verdict.log_evidence - EXACT) < 4 * verdict.log_evidence_error + 1e-3
        assert verdict.log_evidence_error < 0.2


def test_one_row_in_ten_that_is_wrong_shows_in_the_share():
    """Planted: 6 of 60 rows are off by two sd; the others are exact."""

    def guide(x):
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 1.5 * (torch.arange(len(x)) % 10 == 0), 0.5**0.5))

    verdict = dgm.khat(exported(independent, guide))
    wrong = np.flatnonzero(np.asarray(verdict.rows.status) > 1)
    assert verdict.rows.fine == 0.9 and wrong.tolist() == list(range(0, 60, 10)) and verdict.status != "good"


def test_a_small_bias_of_a_row_is_not_called_good():
    """Planted: every row's mean is 0.25 sd off, which costs 0.03 nat a row, below the limit of the gap."""

    def guide(x):
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.25 * 0.5**0.5, 0.5**0.5))

    assert dgm.khat(exported(independent, guide)).status == "usable"


def test_rows_given_the_globals_tell_where_the_fault_is():
    """Planted: a global that is half as wide as it should be, then locals that are; the rows are fine in the first case only."""
    exact = of_hierarchy((1 + 60 / 2) ** -0.5, 0.5**0.5)
    narrow_global = of_hierarchy(0.5 * (1 + 60 / 2) ** -0.5, 0.5**0.5)
    narrow_local = of_hierarchy((1 + 60 / 2) ** -0.5, 0.5 * 0.5**0.5)
    for guide, status, fine in ((exact, "good", 1.0), (narrow_global, "bad", 1.0), (narrow_local, "bad", 0.0)):
        verdict = dgm.khat(exported(hierarchy, guide))
        assert verdict.status == status and verdict.rows.given == "mu" and not verdict.independent
        assert verdict.rows.fine == pytest.approx(fine, abs=0.05), str(verdict)
    assert dgm.khat(exported(hierarchy, exact, check=False)).rows is None


def test_rows_that_are_not_independent_are_not_split():
    """Planted: a datum outside of the plate reads all rows; a guide with one density over all rows."""

    def summed(x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    assert dgm.khat(exported(summed, by_scale(0.9))).rows is None
    flow = dgm.AutoFlow(independent, init_scale=0.7).setup(X)
    assert dgm.khat(exported(independent, flow)).rows is None


def test_nested_plates_are_rows_of_both():
    def nested(x):
        with pyro.plate("b", 5, dim=-2), pyro.plate("a", 12, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.reshape(5, 12))

    guide = AutoNormal(nested, init_scale=0.6)
    rows = dgm.khat(exported(nested, guide)).rows
    assert rows.plate == "b, a" and rows.total == 60


def test_a_vae_has_a_verdict_on_its_rows():
    torch.manual_seed(0)
    likelihood = parts.Conditional(2, 2, lambda loc: dist.Normal(loc, 0.8), network=torch.nn.Linear(2, 2))
    posterior = parts.Conditional(2, 2, parts.normal, hidden_features=(8,))
    vae = dgm.VAE(parts.StandardNormal(2), likelihood, posterior)
    x = torch.randn(20, 2)
    idata = dgm.from_svi(vae.model, vae.guide, x, prior=0, seed=0, container="dict")
    verdict = dgm.khat(idata)
    assert verdict.independent and verdict.rows.total == 20
    bound = dgm.evaluate.evidence_bound(vae, x, 4_000, seed=1)
    error = (verdict.log_evidence_error**2 + float(bound.standard_error.square().sum())) ** 0.5
    assert abs(verdict.log_evidence - float(bound.value.sum())) < 4 * error
    assert "Rows share no latent" in str(dgm.check(idata))


def test_a_picture_of_rows_is_drawn(tmp_path):
    dgm.check(exported(independent, by_scale(0.9))).picture(tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 20_000


def test_functions_of_all_weights_say_that_rows_are_independent():
    idata = exported(independent, by_scale(0.9))
    with pytest.warns(UserWarning, match="rows of plate 'row' are independent, and weights of all rows together"):
        dgm.resample(idata, 50)
    with pytest.warns(UserWarning, match="share no latent, so a row left out is predicted by its prior alone"):
        dgm.loo(idata)


def test_loo_blames_the_data_where_the_guide_is_exact():
    """Planted: one datum 12 sd away. The guide is the posterior (k-hat below 0.2); no better guide would help."""
    x = torch.cat([torch.zeros(8), torch.tensor([12.0])])

    def one(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    precision = 0.01 + len(x)
    guide = lambda x: pyro.sample("mu", dist.Normal(x.sum() / precision, precision**-0.5))
    idata = dgm.from_svi(one, guide, x, prior=0, seed=0, container="dict")
    with pytest.warns(UserWarning, match="The guide is not the cause .* these data move the posterior") as said:
        dgm.loo(idata)
    page = str(dgm.check(idata))
    assert "better guide helps" not in str(said[0].message) and "The posterior is fine, the model is not" in page
    assert dgm.khat(idata).status in ("exact", "good")


# --- Never fitted ---


def test_a_guide_that_was_never_fitted_is_told_so():
    """An AutoFlow knows it, a stock autoguide shows it; after one step neither says so, and of other guides nothing is known."""
    for make in (dgm.AutoFlow, AutoNormal):
        pyro.clear_param_store()
        guide = make(hierarchy)
        guide(X)
        verdict = dgm.khat(exported(hierarchy, guide))
        assert verdict.status == "bad" and "was never fitted" in str(verdict), str(verdict)
        loss = pyro.infer.Trace_ELBO()
        pyro.infer.SVI(hierarchy, guide, pyro.optim.Adam({"lr": 1e-3}), loss).step(X)
        assert "never fitted" not in str(dgm.khat(exported(hierarchy, guide)))
    assert "never fitted" not in str(dgm.khat(exported(independent, by_scale(0.3))))


def test_a_guide_that_starts_at_the_posterior_needs_no_fit():
    start = pyro.infer.autoguide.init_to_value(values={"mu": torch.tensor(0.0)})

    def one(x):
        pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(0.0))

    guide = dgm.AutoFlow(one, init_loc_fn=start, init_scale=0.5**0.5).setup(X)
    assert "never fitted" not in str(dgm.khat(exported(one, guide)))


# --- What to do next ---


def test_resample_is_advised_only_where_it_helps():
    """Planted: weights with k-hat below the threshold and an ESS of 30 of 1,000; an ESS near 1; a plain wide guide."""
    from pyro_dgm.diagnostics.khat import judge

    rng = np.random.default_rng(0)
    z = rng.normal(size=(1_000, 1))
    wide = judge((0.5 * z**2 - 0.5 * (1.5 * z) ** 2).sum(1))
    many = rng.normal(size=(1_000, 12))
    few = judge((0.5 * many**2 - 0.5 * (1.6 * many) ** 2).sum(1))
    lost = judge(20.0 * rng.normal(size=1_000))
    assert wide.repairable and "resample(idata)" in wide.next_step
    for verdict in (few, lost):
        assert verdict.ess < 100 and not verdict.repairable and "resample" not in str(verdict)


def test_the_default_draws_are_chains_that_arviz_can_summarise(capsys, caplog):
    """One chain has an R-hat of NaN and a warning in ``az.summary``."""
    import arviz as az

    idata = dgm.from_svi(independent, by_scale(0.7), X, prior=0, seed=0)
    assert idata.posterior.z.shape == (4, 250, 60)
    table = az.summary(idata, var_names=["z"])
    assert not table.isna().any().any() and not caplog.records
    assert dgm.from_svi(independent, by_scale(0.7), X, prior=0, num_samples=100).posterior.z.shape == (1, 100, 60)
