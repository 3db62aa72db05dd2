"""Plates of sizes that were not trained, and data that were not: what is learned, what is kept, and what is said."""

import copy
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size

import pyro_dgm as dgm
from pyro_dgm.amortized.forward_kl import thinned
from pyro_dgm.amortized.sets import SetEncoder, Sets, Statistics
from pyro_dgm.amortized.trained import Trained
from pyro_dgm.core.networks import LinearPosterior
from tests.amortized.amortized_models import groups

SD = 0.5  # of a datum


def level(n=30, y=None):
    """mu | y is normal: precision 1 + n / SD^2."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", n if y is None else y.shape[-1]):
        return pyro.sample("y", dist.Normal(mu, SD), obs=y)


def exact(y):
    precision = 1.0 + y.shape[-1] / SD**2
    return y.sum(-1) / SD**2 / precision, precision**-0.5


def fitted(model, sims, observed=("y",), steps=100, **options):
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(model, observed=list(observed), **options)
    dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=0, max_steps=steps)
    return guide


@pytest.fixture(scope="module")
def level_guide():
    return fitted(level, dgm.simulate(level, 2_000, observed=["y"], seed=0, progress=False))


def said(guide, **data):
    """What a call of condition says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = guide.condition(**data)
    return posterior, [str(w.message) for w in caught]


@pytest.mark.parametrize("n, limit", [(1, 0.6), (3, 0.25), (30, 0.2), (300, 0.5), (3_000, 1.2)])
def test_a_guide_of_30_rows_at_other_sizes(level_guide, n, limit):
    """Means in sds of the posterior, over 40 data sets. Planted faults: without the statistics (learned means alone) 0.34 off at 30
    rows, 1.2 at 300, 3.8 at 3,000; with a width that does not follow the number of data its log is 1.1 too large at 300; with a
    wide component whose weight does not fade the log sd is 0.58 too large at 300, and more at 3,000."""
    mu = torch.randn(40, 1, generator=torch.Generator().manual_seed(1))
    y = mu + SD * torch.randn(40, n, generator=torch.Generator().manual_seed(n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = level_guide.condition(y=y).sample((1_000,))["mu"]
    mean, sd = exact(y)
    assert float(((draws.mean(0) - mean) / sd).abs().mean()) < limit
    assert float((draws.std(0) / sd).log().mean().abs()) < limit


def test_statistics_are_those_of_the_set_and_padding_is_none_of_it():
    """Against numpy. Planted fault: padded rows that are pooled; the mean is 0.4 off."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 3) * torch.tensor([1.0, 1.0, 2.0]) + 1.0
    mask = torch.arange(7) < torch.tensor([[7], [5], [6]])
    sets = Sets(x.shape[:-1], [-1], mask)
    found = Statistics(3, 2).of(sets.take(x), sets, None)
    own = x[1, :5].double()
    assert torch.allclose(found[1, 0], torch.tensor(5.0).log())
    assert torch.allclose(found[1, 1:4].double(), own.mean(0))
    assert torch.allclose(found[1, 4:7].double(), own.std(0).log(), atol=1e-5)
    assert torch.allclose(found[1, 13:16].double(), torch.corrcoef(own.mT)[[0, 0, 1], [1, 2, 2]], atol=1e-5)
    assert torch.allclose(
        found[1, 16:], Statistics(3, 2).of(x[1, :5], Sets(Size([5]), [-1], None), None)[0, 16:], atol=1e-3
    )


def regressed(n, count=1_000):
    """Coefficients b and s of many regressions with an intercept of 1 +- 0.1, and what LinearPosterior takes of them."""
    torch.manual_seed(n)
    b = torch.tensor([1.0, 0.0, 0.0]) + torch.tensor([0.1, 1.0, 3.0]) * torch.randn(count, 3)
    s = torch.exp(-1.0 + 0.5 * torch.randn(count))
    x = torch.cat([torch.ones(count, n, 1), torch.randn(count, n, 2)], -1)
    y = (x * b[:, None]).sum(-1) + s[:, None] * torch.randn(count, n)
    square = y.square().sum(-1, keepdim=True)
    return b, s, (x.mT @ x, x.mT @ y[..., None], square, torch.full((count,), float(n)), torch.full((count, 1), 1e-10))


@pytest.mark.parametrize("n", [2, 3, 5, 50])
def test_the_posterior_of_a_regression_is_calibrated_for_any_number_of_rows(n):
    """Errors of the coefficients in its own deviations have mean square 1 (within 0.25), in sets with fewer rows than coefficients
    too. Planted fault: a prior of one unit in the place of the learned one; 6.6 for the widest coefficient at two rows."""
    linear = LinearPosterior(3, 1)
    linear.fit(*regressed(60)[2])
    assert torch.allclose(linear.place[0], torch.tensor([1.0, 0.0, 0.0]), atol=0.3)
    assert torch.allclose(linear.scale[0], torch.tensor([0.1, 1.0, 3.0]), rtol=0.15)
    b, s, sums = regressed(n)
    found = linear(*sums)
    error = (b - found[:, 1:4]) / found[:, 4:7].exp() * n**0.5
    assert (error.square().mean(0) - 1.0).abs().max() < 0.25
    assert float((found[:, 0] - s.log()).square().mean().sqrt()) < 0.6


def test_a_set_is_read_without_its_order_and_its_padding():
    """Planted fault: padded rows that are pooled."""
    torch.manual_seed(0)
    encoder = SetEncoder(2, inputs=1)
    x = torch.randn(4, 6, 2)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [6]])
    out = encoder(x, [-1], mask)
    assert out.shape == (4, 1, encoder.out_features)
    assert torch.allclose(out[1], encoder(x[1, :3].flip(0), [-1])[0], atol=1e-4)
    assert torch.allclose(out, encoder(torch.where(mask[..., None], x, 99.0), [-1], mask), atol=1e-4)


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("group", sigma.shape[-1]):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def summed(n=5, y=None, total=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", n):
        y = pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.sample("total", dist.Normal(y.sum(-1), 1.0), obs=total)


def sized_prior(n=5, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0 / n))
    with pyro.plate("row", n if y is None else y.shape[-1]):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def design(y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(slope[..., None] * torch.arange(4.0), 1.0), obs=y)


def random_size(y=None):
    n = pyro.sample("n", dist.Binomial(8, 0.5))
    with pyro.plate("row", int(n) + 2):
        pyro.sample("y", dist.Normal(n, 1.0), obs=y)


def nested(groups=4, rows=3, y=None):
    if y is not None:
        groups, rows = y.shape[-2:]
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", groups, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("row", rows, dim=-1):
            return pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


SIGMA = torch.tensor([1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    "model, options, expected",
    [
        (level, {}, {"row"}),
        (groups, {}, {"group"}),
        (nested, {}, {"group", "row"}),
        (schools, {"args": (SIGMA,), "covariates": ["sigma"]}, {"group"}),
        (schools, {"args": (SIGMA,)}, set()),
        (summed, {"observed": ["y", "total"]}, set()),
        (sized_prior, {}, set()),
        (design, {}, set()),
        (random_size, {}, set()),
    ],
)
def test_which_elements_are_alike(model, options, expected):
    """A design that stays, a sum over the plate, a prior that knows the size: a part of such data is not such data.
    Planted fault: all plates are taken for alike."""
    assert dgm.AmortizedGuide(model, **({"observed": ["y"]} | options)).alike == expected


def test_a_part_of_a_simulation_has_any_size_and_its_own_latents():
    """Sizes even in their logarithm in three quarters of the simulations; data and latents of an element go together.
    Planted faults: no simulation stays whole; sizes that are even themselves."""
    guide = dgm.AmortizedGuide(nested, ["y"], kwargs={"groups": 20, "rows": 6})
    batch = {"mu": torch.zeros(4_000), "theta": torch.zeros(4_000, 20, 1), "y": torch.zeros(4_000, 20, 6)}
    masks = thinned(batch, guide.structure, guide.alike, None)["mask"]
    sizes = masks["theta"][..., 0].sum(1)
    assert abs(float((sizes == 20).double().mean()) - (0.25 + 0.75 * math.log(21 / 20) / math.log(21))) < 0.04
    assert abs(float((sizes == 1).double().mean()) - 0.75 * math.log(2) / math.log(21)) < 0.04
    assert torch.equal(masks["y"].any(2), masks["theta"][..., 0])
    again = [
        thinned(batch, guide.structure, guide.alike, torch.Generator().manual_seed(0))["mask"]["y"] for _ in range(2)
    ]
    assert torch.equal(*again)


def test_simulations_with_sizes_of_their_own_lose_elements_down_to_the_least():
    """A quarter keeps all it has; no other simulation gets an element that it has not. Planted faults: sizes kept as they are, from
    step to step the same rows; sizes from 1 up."""
    guide = dgm.AmortizedGuide(level, ["y"], kwargs={"n": 40})
    there = torch.arange(40) < torch.randint(5, 41, (4_000, 1))
    batch = {"mu": torch.zeros(4_000), "y": torch.zeros(4_000, 40), "mask": {"y": there}}
    mask = thinned(batch, guide.structure, guide.alike, None)["mask"]["y"]
    assert not bool((mask & ~there).any()) and int(mask.sum(1).min()) == 5
    whole = (mask.sum(1) == there.sum(1)) & (there.sum(1) > 20)
    assert 0.25 < float(whole.sum() / (there.sum(1) > 20).sum()) < 0.32


def regression(n=40, x=None, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("row", n if y is None else y.shape[-1]):
        x = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        return pyro.sample("y", dist.Normal(a + b * x, SD), obs=y)


def test_inputs_stand_beside_their_data():
    """Slope and intercept within 0.5 sd at 5, 40 and 400 rows. Planted fault: sites that are pooled apart know no slope, and
    are 1.3 off at 5 rows and more at others."""
    guide = fitted(regression, dgm.simulate(regression, 2_000, observed=["x", "y"], seed=0, progress=False), ["y", "x"])
    for n in (5, 40, 400):
        torch.manual_seed(n)
        x, off = torch.randn(20, n), []
        y = torch.randn(20, 1) + torch.randn(20, 1) * x + SD * torch.randn(20, n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = guide.condition(x=x, y=y).sample((1_000,))
        for i in range(20):
            rows = torch.stack([torch.ones(n), x[i]], 1).double()
            covariance = torch.linalg.inv(rows.T @ rows / SD**2 + torch.eye(2))
            mean = covariance @ rows.T @ y[i].double() / SD**2
            found = torch.stack([draws["a"][:, i].mean(), draws["b"][:, i].mean()])
            off.append((found - mean).abs() / covariance.diagonal().sqrt())
        assert float(torch.stack(off).mean()) < 0.5


# --- What is said -----------------------------------------------------------------------------------------------------


def test_an_untrained_guide_says_so():
    """Planted fault: the checksum is not asked."""
    guide = dgm.AmortizedGuide(level, ["y"])
    _, words = said(guide, y=torch.zeros(30))
    assert len(words) == 1 and "the guide was never trained" in words[0]


def test_sizes_outside_of_training_are_said_once(level_guide, tmp_path):
    """By the loaded guide too. Refinement says nothing of it again. Planted fault: sizes that training does not note."""
    torch.save(level_guide.state_dict(), tmp_path / "guide.pt")
    guide = dgm.AmortizedGuide(level, ["y"])
    guide.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    assert said(guide, y=torch.randn(30))[1] == []
    posterior, words = said(guide, y=torch.randn(31))
    assert len(words) == 1 and "plate 'row' has 31 elements, and the guide was trained on 1 to 30" in words[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample((10,))
        posterior.refine(200, seed=0)
    _, words = said(guide, y=torch.randn(4, 31))
    assert len(words) == 1 and "31 elements in 4 of 4 data sets" in words[0] and "sizes={'row': (1, 31)}" in words[0]


def test_data_outside_of_the_simulations_are_said(level_guide):
    """A mean, a spread, and a shape that no simulation has: one wild row among thirty. Planted fault: no limit is kept."""
    y = torch.randn(30, generator=torch.Generator().manual_seed(0)) * SD
    assert said(level_guide, y=y)[1] == []
    for odd in (y + 20.0, 30.0 * y, torch.cat([y[:29], torch.tensor([40.0])])):
        _, words = said(level_guide, y=odd)
        assert len(words) == 1 and "'y'" in words[0] and "outside of the range" in words[0]
    _, words = said(level_guide, y=torch.stack([y, y + 20.0, y - 20.0, y]))
    assert len(words) == 1 and "2 of 4 data sets are outside" in words[0]


@pytest.mark.parametrize("n", [1, 3, 30])
def test_the_model_s_own_data_give_no_alarm(level_guide, n):
    """At most 1 % of 1,000 alone (measured: 0.1 to 0.6 %), and no word about all of them. Planted fault: ranges of whole
    simulations only, by which 60 % of those with one row are outside."""
    y = dgm.simulate(level, 1_000, n, observed=["y"], seed=7, progress=False)["y"]
    assert sum(bool(said(level_guide, y=row)[1]) for row in y[:300]) <= 7
    assert said(level_guide, y=y)[1] == []


def test_a_guide_that_was_trained_on_data_knows_them():
    """Planted fault: an ELBO's training that keeps sizes and range of the simulations before it."""
    y = torch.randn(5) + 30.0
    guide = fitted(groups, dgm.simulate(groups, 500, observed=["y"], seed=0, progress=False), steps=2)
    assert said(guide, y=y)[1] and said(guide, y=torch.zeros(9))[1]
    dgm.fit(dgm.STL_ELBO()(groups, guide), (y,), max_steps=5, progress=False, seed=0)
    assert said(guide, y=y)[1] == [] and said(guide, y=torch.zeros(9))[1] == []


def test_a_plate_without_elements_is_refused_and_advised_sizes_can_be_simulated():
    """Planted faults: no element is a size like any other, and what is advised for 0 elements are sizes from 1 to 0."""
    guide = dgm.AmortizedGuide(level, ["y"])
    for call in (lambda: guide.condition(y=torch.zeros(0)), lambda: guide(y=torch.zeros(0))):
        with pytest.raises(ValueError, match=r"'y' has shape \(0,\), so plate 'row' holds no element"):
            call()
    with pytest.raises(ValueError, match="ForwardKL: .* holds no element"):
        dgm.ForwardKL(guide)({"mu": torch.zeros(4), "y": torch.zeros(4, 0)})
    said = Trained(["row"], [], 1)
    said.on_sizes({"row": torch.tensor([5, 10])})
    assert "sizes={'row': (2, 10)}" in next(said.unusual_sizes({"row": torch.tensor([2])}))
    assert "sizes={'row': (1, 10)}" in next(said.unusual_sizes({"row": torch.tensor([0])}))


def test_a_guide_can_be_copied_and_pickled_after_it_was_used():
    """Planted fault: it keeps the proxy of the model's parameters, of which no copy can be made."""
    guide = dgm.AmortizedGuide(level, ["y"])
    assert guide.arguments.names == ["n", "y"]
    score = guide.condition(y=torch.zeros(4)).log_prob({"mu": torch.zeros(3)})
    for again in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(again.condition(y=torch.zeros(4)).log_prob({"mu": torch.zeros(3)}), score)
