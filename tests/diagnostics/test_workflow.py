"""An amortised guide on many data sets: what is accepted is right, what is not is repaired or refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm


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


def test_a_simulator_without_a_density_is_left_unchecked():
    pyro.set_rng_seed(0)
    plain = dgm.as_model(simulator, {"mu": dist.Normal(0.0, 1.0)})
    guide = dgm.AmortizedGuide(plain, observed=["x"])
    sims = dgm.simulate(plain, 500, observed=["x"], seed=0, progress=False)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=100, progress=False, seed=0)
    result = found(guide)
    assert set(result.status) == {"unchecked"} and "sbc" in str(result)
    assert found(guide, {"x": torch.tensor([0.0, 40.0])}).status == ("unchecked", "refused")


def test_numbers_of_data_sets_that_differ_are_refused(guide):
    with pytest.raises(ValueError, match="expected one number"):
        found(guide, {"x": torch.tensor(1.0)})
