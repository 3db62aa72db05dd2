"""An amortised guide on many data sets: what is accepted is right, what is not is repaired or refused."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.diagnostics import local_calibration
from pyro_dgm.diagnostics.populations import _alike, _still
from pyro_dgm.diagnostics.workflow import _CHANGE, _changed


def model(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(mu, 0.5), obs=x)


def exact(x):
    """Mean and sd of mu."""
    return 0.8 * x, 0.2**0.5


def trained(steps):
    pyro.set_rng_seed(0)
    guide = dgm.AmortizedGuide(model, observed=["x"])
    sims = dgm.simulate(model, 2000, observed=["x"], seed=0, progress=False)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=steps, progress=False, seed=0)
    return guide


@pytest.fixture(scope="module")
def guide():
    return trained(400)


DATA = {"x": torch.tensor([-1.5, -0.2, 0.0, 0.7, 1.8])}


def found(guide, data=DATA, **options):
    return dgm.workflow(guide, data, **{"num_samples": 400, "seed": 0, "progress": False} | options)


def off(draws, x):
    mean, sd = exact(x)
    return max(abs(float(draws.mean()) - float(mean)) / sd, abs(float(draws.std()) / sd - 1.0))


def test_a_right_guide_is_accepted(guide):
    result = found(guide)
    assert result.status == ("accepted",) * 5 and len(result) == 5 and result.share("accepted") == 1.0
    assert all(off(d, x) < 0.2 for d, x in zip(result.draws["mu"], DATA["x"], strict=True))
    assert "5 data sets" in str(result) and len(result.table().splitlines()) == 6


def test_a_shifted_guide_is_repaired(guide):
    """Planted: the regression that the guide starts from, moved by .7 and by 3 sd."""
    family = guide.groups[0].family
    kept = family.offset.clone()
    for shift, allowed in ((0.7, {"reweighted", "moved"}), (3.0, {"moved"})):
        family.offset.copy_(kept + shift * 0.45)
        result = found(guide)
        family.offset.copy_(kept)
        assert set(result.status) <= allowed
        assert all(off(d, x) < 0.25 for d, x in zip(result.draws["mu"], DATA["x"], strict=True))


def shifted(guide, by):
    """The posterior draws of mu, moved by so many sd: a planted fault."""
    moved = copy.deepcopy(guide)
    moved.groups[0].family.offset.add_(by * 0.45)
    return moved


def test_a_guide_shifted_by_half_an_sd_is_never_accepted(guide):
    """Planted: a shift of .5 sd, in both directions, at 40 data sets."""
    x = dgm.simulate(model, 40, observed=["x"], seed=5, progress=False)["x"]
    for by in (-0.5, 0.5):
        assert not found(shifted(guide, by), {"x": x}).where("accepted")


def test_draws_are_accepted_only_where_their_sds_are_right(guide):
    """Planted: draws 1.15 times as wide have the right mean and a gap of .02 nats, below the .05 of a good verdict."""
    u = torch.randn(4000, 1)
    assert _changed(u, (-0.5 * u[:, 0].square() * (1.15**2 - 1.0)).softmax(0)) > _CHANGE
    assert _changed(u, torch.full((4000,), 1 / 4000)) < 1e-3  # n or n - 1


def test_populations_in_different_modes_have_not_settled():
    """Planted: eight populations of 125 chains whose shares of two modes are .3 to .7, where all should have .5."""
    torch.manual_seed(0)
    shares = torch.linspace(0.3, 0.7, 8)[:, None]
    for share, settled in ((shares, False), (torch.full((8, 1), 0.5), True)):
        places = (torch.rand(8, 125) < share).double().reshape(-1, 1) * 8.0 + torch.randn(1000, 1)
        assert _alike(places) is settled


def test_a_drift_that_all_chains_share_has_not_settled():
    """Planted: every chain moves by a tenth of its sd."""
    torch.manual_seed(0)
    before = torch.randn(1000, 1, dtype=torch.float64)
    noise = 0.3 * torch.randn(1000, 1, dtype=torch.float64)
    assert _still(before, before + noise) and not _still(before, before + noise + 0.1)


def test_data_without_any_density_are_refused_and_the_rest_is_kept(guide):
    with pytest.warns(UserWarning):
        guide.condition(x=torch.tensor(1e30))
    result = found(guide, {"x": torch.tensor([0.0, 1e30])})
    assert result.status[0] == "accepted" and result.where("refused") == [1]
    assert "Refused: 1;" in str(result) and result.notes[1] and not result.notes[0]


def test_a_container_of_one(guide):
    idata = found(guide).container(3, prior=0, container="dict")
    assert idata["groups"]["posterior"]["mu"].shape == (4, 100)


def test_the_same_seed_gives_the_same_draws(guide):
    assert torch.equal(found(guide).draws["mu"], found(guide).draws["mu"])


def simulator(mu, rng):
    return mu + 0.5 * rng.normal()


@pytest.fixture(scope="module")
def plain():
    """A simulator without a density, its guide, and simulations that the guide has not seen."""
    pyro.set_rng_seed(0)
    program = dgm.as_model(simulator, {"mu": dist.Normal(0.0, 1.0)})
    guide = dgm.AmortizedGuide(program, observed=["x"])
    sims = dgm.simulate(program, 5000, observed=["x"], seed=0, progress=False)
    dgm.fit(dgm.ForwardKL(guide), {k: v[:2000] for k, v in sims.items()}, max_steps=400, progress=False, seed=0)
    return guide, {k: v[2000:] for k, v in sims.items()}


def test_a_simulator_without_a_density_is_left_unchecked(plain):
    guide, _ = plain
    result = found(guide)
    assert set(result.status) == {"unchecked"} and "sbc" in str(result)
    assert found(guide, {"x": torch.tensor([0.0, 40.0])}).status == ("unchecked", "refused")


def test_simulations_judge_where_there_is_no_density(plain):
    """Planted: a shift of .5 sd is refused at every data set; the right guide is refused at none of 40, nor outside accepted."""
    guide, simulations = plain
    x = torch.cat(
        [dgm.simulate(model, 40, observed=["x"], seed=5, progress=False)["x"].clamp(-2.0, 2.0), torch.tensor([40.0])]
    )
    assert found(guide, {"x": x}, simulations=simulations).status == ("accepted",) * 40 + ("refused",)
    bad = found(shifted(guide, 0.5), {"x": x}, simulations=simulations)
    assert set(bad.status) == {"refused"} and "nearest simulations" in bad.notes[0]


def test_p_values_of_a_right_posterior_are_uniform():
    """200 neighbourhoods of 200 uniform ranks; planted: ranks of a posterior .3 sd too high, and of one 1.3 times as wide."""
    torch.manual_seed(0)
    z, normal = torch.randn(200, 200, 1).double(), dist.Normal(0.0, 1.0)
    share = lambda u: (local_calibration._smooth_p_values(u.numpy()) < 0.05).mean()
    assert share(normal.cdf(z)) < 0.10
    assert share(normal.cdf(z - 0.3)) > 0.9 and share(normal.cdf(z / 1.3)) > 0.9


def test_simulations_that_do_not_fit_are_refused(plain):
    guide, simulations = plain
    with pytest.raises(ValueError, match="at least 1000"):
        found(guide, simulations={k: v[:500] for k, v in simulations.items()})
    with pytest.raises(ValueError, match=r"lack \['x'\]"):
        found(guide, simulations={"mu": simulations["mu"]})
    with pytest.raises(ValueError, match="2 numbers of data each, expected 1"):
        found(guide, simulations={"mu": simulations["mu"], "x": simulations["x"][:, None].expand(-1, 2)})


def test_numbers_of_data_sets_that_differ_are_refused(guide):
    with pytest.raises(ValueError, match="expected one number"):
        found(guide, {"x": torch.tensor(1.0)})


def test_a_data_set_with_a_hole_is_refused_and_the_others_go_on():
    """Planted: one NaN ended the call and did not say where."""

    def model(x=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(mu[..., None] + torch.zeros(2), 1.0).to_event(1), obs=x)

    guide = dgm.AmortizedGuide(model, observed=["x"], ensemble=1)
    sims = dgm.simulate(model, 1_000, observed=["x"], seed=0, progress=False)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=50, progress=False, seed=0)
    x = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [1.0, 0.5]])
    found = dgm.workflow(guide, {"x": x}, num_samples=100, progress=False, seed=0)
    assert found.where("refused") == [1] and bool(found.draws["mu"][1].isnan().all()) and "NaN" in found.notes[1]
    with pytest.raises(ValueError, match="data set 1 could not be read"):
        found.container(1)
