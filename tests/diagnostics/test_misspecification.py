"""The range of a simulator: the test keeps its level, and sees what was planted. Calibration on given simulations."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binomtest, kstest

import pyro_dgm as dgm
from pyro_dgm.diagnostics import misspecification
from pyro_dgm.diagnostics.misspecification import _range
from tests.diagnostics.test_calibration import POSTERIOR, Amortised, model


def walk(x=None):
    """Twelve steps of a random walk whose size is unknown: correlated data, tails wider than normal."""
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    cov = torch.minimum(*torch.meshgrid(*[torch.arange(1.0, 13.0)] * 2, indexing="ij"))
    tril = torch.linalg.cholesky(cov) * s[..., None, None]
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(12), scale_tril=tril), obs=x)


@pytest.fixture(scope="module")
def sims():
    return dgm.simulate(walk, 4_000, observed=["x"], seed=0, progress=False)


def test_the_p_value_of_the_model_s_own_data_is_uniform(sims):
    """2,000 fresh data sets: p at most 1 %, 5 %, 20 % as often as that (binomial, p > 1e-3), given the one split.

    Scores of simulations that are too small by 0.7, the fault, reject 4 % at the 1 % level and 15 % at the 5 % level.
    """
    fresh = dgm.simulate(walk, 2_000, observed=["x"], seed=1, progress=False)["x"].double()
    p = _range(sims["x"].double(), 0).p_values(fresh)[0].numpy()
    for level in (0.01, 0.05, 0.2):
        assert binomtest(int((p <= level).sum()), len(p), level * 1.25 + 0.002, alternative="greater").pvalue > 1e-3
    assert kstest(p, "uniform").statistic < 0.06  # two samples of 2,000: 0.06 at p = 1e-3


def test_what_was_planted_is_seen(sims):
    """A jump back and forth (every number alone is usual), a scale that no prior draw has, and white noise."""
    zigzag = 2.0 * torch.tensor([1.0, -1.0]).repeat(6)
    with pytest.warns(UserWarning, match="their combination is. An amortised posterior was not trained on such data"):
        result = misspecification(sims, x=zigzag)
    assert result.p_value < 0.01 and min(result.marginal.values()) > 0.05
    with pytest.warns(UserWarning, match=r"'x'\[0\] is more extreme than all but"):
        result = misspecification(sims, x=torch.tensor([60.0] + [61.0] * 11))
    assert result.outside and result.score > result.scores.max()
    assert not misspecification(sims, x=torch.arange(12.0) * 0.2).outside


def test_summaries_and_padded_sites_are_compared(sims):
    steps = lambda data: data["x"].diff(dim=-1).square().mean(-1, keepdim=True).log()
    with pytest.warns(UserWarning, match=r"summary\[0\] is more extreme"):
        misspecification(sims, summary=steps, x=torch.full((12,), 0.3))
    padded = dgm.Simulations(
        {"x": torch.randn(400, 6) * (torch.arange(6) < torch.randint(2, 7, (400, 1)))}, ["x"],
        mask={"x": torch.arange(6) < torch.randint(2, 7, (400, 1))},
    )  # fmt: skip
    assert not misspecification(padded, x=torch.tensor([0.3, -1.0, 0.8])).outside
    with pytest.warns(UserWarning, match="mean of 'x' is more extreme"):
        misspecification(padded, x=torch.tensor([9.0, 9.3, 8.0]))


def test_bad_observations_are_explained(sims):
    for data, words in (
        ({"y": torch.zeros(12)}, r"got data of \['y'\], expected all observed sites, \['x'\]"),
        ({"x": torch.zeros(3)}, r"'x' has shape \(3,\), expected \(12,\)"),
        ({"x": torch.full((12,), torch.nan)}, "'x' holds NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            misspecification(sims, **data)
    with pytest.raises(ValueError, match="100 simulations, expected at least 200"):
        misspecification(sims[:100], x=torch.zeros(12))
    with pytest.raises(ValueError, match=r"observed=\['q'\]: expected names among"):
        misspecification(sims, observed=["q"], x=torch.zeros(12))
    with pytest.raises(ValueError, match=r"summary gave shape \(4000,\) for 4000"):
        misspecification(sims, summary=lambda data: data["x"].sum(-1), x=torch.zeros(12))


# --- Calibration on given simulations ------------------------------------------------------------------------------------


class Batched(Amortised):
    """The same posterior for many data sets at once; it counts how often it is asked."""

    asked = 0

    def condition(self, x):
        Batched.asked += 1
        loc = 2.0 * x @ POSTERIOR + self.bias * POSTERIOR.diagonal().sqrt()
        q = dist.MultivariateNormal(loc, self.scale**2 * POSTERIOR)
        return Many(q, x.dim() - 1)


class Many:
    def __init__(self, q, lead):
        self.q, self.lead = q, lead

    def sample(self, shape):
        return {"t": self.q.sample(shape)}

    def log_prob(self, values):
        return self.q.log_prob(values["t"])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_simulations_and_summaries_that_are_not_finite_are_explained(sims, bad):
    """Planted fault: they reach the eigenvectors, and torch says 'linalg.eigh: the algorithm failed to converge'."""
    broken = {"x": sims["x"].clone()}
    broken["x"][7, 3] = bad
    with pytest.raises(ValueError, match="misspecification: 1 of 4000 simulations of 'x' hold NaN or infinity"):
        misspecification(broken, observed=["x"], x=torch.zeros(12))
    with pytest.raises(ValueError, match="misspecification: 1 of 4000 summaries hold NaN or infinity"):
        misspecification(sims, summary=lambda data: data["x"] * 0 + broken["x"][: len(data["x"])], x=torch.zeros(12))


@pytest.fixture(scope="module")
def held_out():
    return dgm.simulate(model, 300, observed=["x"], seed=7, progress=False)


def test_calibration_on_given_simulations(held_out):
    """The exact posterior passes all three, sd x 0.7 fails sbc and coverage at p < 1e-4; one call serves 300 data sets."""
    for check in (dgm.sbc, dgm.coverage, dgm.tarp):
        Batched.asked = 0
        assert check(None, Batched(), simulations=held_out, seed=0).calibrated and Batched.asked == 1
    for check in (dgm.sbc, dgm.coverage):
        assert check(model, Batched(0.7), simulations=held_out, seed=0).p_value < 1e-4
    assert dgm.sbc(None, Batched(), simulations=held_out, num_simulations=50, seed=0).pit["t"].shape == (50, 2)


def test_a_fault_of_many_at_once_is_seen(held_out):
    """A posterior that is right for one data set, and gives all of many the first one's draws."""

    class Mixing(Batched):
        def condition(self, x):
            return super().condition(x[:1].expand(len(x), 2) if x.dim() > 1 else x)

    assert dgm.sbc(None, Mixing(), simulations=held_out, seed=0).p_value < 1e-10

    class Short(Batched):
        def condition(self, x):
            made = super().condition(x[0] if x.dim() > 1 else x)
            made.lead = 1
            return made

    with pytest.raises(
        ValueError, match=r"posterior of 300 data sets gave draws of shapes \{'t': \(199, 2\)\}, expected"
    ):
        dgm.sbc(None, Short(), simulations=held_out, seed=0)


def test_wrong_simulations_are_explained(held_out):
    with pytest.raises(ValueError, match="model is None: expected a model that simulates"):
        dgm.sbc(None, Batched())
    with pytest.raises(ValueError, match=r"observed=\['q'\]: expected names"):
        dgm.sbc(None, Batched(), observed=["q"], simulations=held_out)
    with pytest.raises(ValueError, match="has no log_prob, so it needs the model's density"):
        dgm.coverage(None, lambda data: Amortised().condition(**data).sample((9,)), simulations=held_out, num_draws=9)
    padded = dgm.Simulations(dict(held_out), ["x"], mask={"x": torch.ones(300, 2).bool()})
    with pytest.raises(ValueError, match=r"sites \['x'\] are padded"):
        dgm.sbc(None, Batched(), simulations=padded)


def test_ranks_are_drawn_by_arviz(held_out, tmp_path):
    dgm.sbc(None, Batched(0.6), simulations=held_out, seed=0).picture(tmp_path / "sbc.png")
    assert (tmp_path / "sbc.png").stat().st_size > 10_000


def counts(x=None):
    rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
    with pyro.plate("n", 5):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def groups(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 4):
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(t, 0.5), obs=x)


class Exact:
    """The exact posterior of a model above for many data sets, with sd times ``scale``."""

    def __init__(self, of, scale=1.0):
        self.of, self.scale = of, scale

    def condition(self, x):
        return self.of(x, self.scale)


class Rate:
    lead = 1

    def __init__(self, x, scale):
        self.q = dist.Gamma((3.0 + x.sum(-1)) / scale**2, 6.0 / scale**2)

    def sample(self, shape):
        return {"rate": self.q.sample(shape)}

    def log_prob(self, values):
        return self.q.log_prob(values["rate"])


class Groups:
    lead = 1

    def __init__(self, x, scale):
        precision = torch.eye(5) * 5.0  # mu, t1 .. t4: 1 + 4 and 1 + 1 / 0.25
        precision[0, 1:] = precision[1:, 0] = -1.0
        covariance = torch.linalg.inv(precision)
        self.q = dist.MultivariateNormal(4.0 * x @ covariance[1:], scale**2 * covariance)

    def sample(self, shape):
        drawn = self.q.sample(shape)
        return {"mu": drawn[..., 0], "t": drawn[..., 1:]}

    def log_prob(self, values):
        return self.q.log_prob(torch.cat([values["mu"][..., None], values["t"]], -1))


@pytest.mark.parametrize("program, of", [(counts, Rate), (groups, Groups)])
def test_exact_posteriors_pass_and_narrow_ones_do_not(program, of):
    """With the plane normal above, three models: exact accepted, sd x 0.7 rejected at p < 1e-4, by sbc and coverage."""
    sims = dgm.simulate(program, 500, observed=["x"], seed=3, progress=False)
    for check in (dgm.sbc, dgm.coverage):
        options = {"simulations": sims, "num_simulations": 500, "seed": 0}
        assert check(None, Exact(of), **options).p_value > 0.01
        assert check(None, Exact(of, 0.7), **options).p_value < 1e-4


@pytest.mark.parametrize("wrong, match", [
    ({"t": torch.full((300, 2), torch.nan)}, "truths of 't' hold NaN"),
    ({"t": torch.zeros(7, 2)}, r"simulations: sites have first dimensions .*'t': \(7,\)"),
    ({"t": torch.zeros(300, 3)}, r"'t' has shape \(3,\) in each, and \(2,\) in the posterior's draws"),
    ({"t": None}, r"The simulations lack \['t'\]|none of which is a latent"),
])  # fmt: skip
def test_given_simulations_that_lack_truths_are_explained(held_out, wrong, match):
    """Planted fault: numpy says 'Range exceeds valid bounds', or a KeyError ends the run."""
    kept = {k: v for k, v in (dict(held_out) | wrong).items() if v is not None}
    for check in (dgm.sbc, dgm.coverage, dgm.tarp):
        with pytest.raises(ValueError, match=match):
            check(None, Batched(), simulations=kept, observed=["x"], num_simulations=40, num_draws=9, seed=0)
