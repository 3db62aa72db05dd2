"""Amortised posteriors against exact ones: Gaussian, truncated, discrete, hierarchical; masks, sizes, trainings, errors."""

import math
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Importance, Predictive
from pyro.infer.autoguide import init_to_value
from torch import nn

import pyro_dgm as dgm
from tests.amortized.amortized_models import boxed, groups, kinds, normal
from tests.benchmarks import amortized as bench


def trained(model, steps, observed=("x",), seed=0, **options):
    guide = dgm.AmortizedGuide(model, observed, **options)
    dgm.fit(dgm.ForwardKL(guide), max_steps=steps, progress=False, seed=seed)
    return guide


@pytest.fixture(scope="module")
def normal_guide():
    return trained(normal, 200)


def test_a_budget_of_simulations_gives_the_exact_posterior_with_no_argument():
    """Planted fault: pairs shuffled against each other give the prior, sd 1 in place of 0.71."""
    sims = dgm.simulate(normal, 2000, observed=("x",), seed=0, progress=False)
    guide = dgm.AmortizedGuide(normal, observed=("x",))
    history = dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=0, max_epochs=20)
    assert history.validation and history.best_loss < 1.2  # the entropy is 1.072
    for x in (-2.0, 0.5, 3.0):
        mu = guide.condition(x=torch.tensor(x)).sample((4000,))["mu"]
        assert abs(mu.mean() - x / 2) < 0.1 and abs(mu.std() - math.sqrt(0.5)) < 0.08


def test_many_data_sets_at_once_are_as_one_by_one(normal_guide):
    """Planted fault: contexts in another order than the data shift every mean by up to 3."""
    x = torch.tensor([-2.0, 0.0, 2.0])
    many = normal_guide.condition(x=x)
    draws = many.sample((500,))
    assert draws["mu"].shape == (500, 3) and torch.allclose(draws["mu"].mean(0), x / 2, atol=0.2)
    each = [normal_guide.condition(x=v).log_prob({"mu": draws["mu"][:, i]}) for i, v in enumerate(x)]
    assert torch.allclose(many.log_prob(draws), torch.stack(each, -1), atol=1e-4)


def test_sizes_order_and_masks_of_a_plate():
    """Masked data count as absent, exactly; order does not matter. Planted fault: a sum in place of the masked mean."""
    guide = trained(groups, 30, ["y"])
    y = torch.randn(8)
    draws = guide.condition(y=y).sample((6,))
    assert draws["theta"].shape == (6, 8) and draws["mu"].shape == (6,)
    order = torch.randperm(8)
    turned = {"mu": draws["mu"], "theta": draws["theta"][:, order]}
    here = guide.condition(y=y).log_prob(draws)
    assert torch.allclose(here, guide.condition(y=y[order]).log_prob(turned), atol=1e-4)
    longer, present = torch.cat([y, torch.tensor([math.nan, 7.0])]), torch.arange(10) < 8
    masked = guide.condition(y=longer, mask={"y": present, "theta": present})
    padded = {"mu": draws["mu"], "theta": torch.cat([draws["theta"], torch.zeros(6, 2)], 1)}
    assert torch.allclose(here, masked.log_prob(padded), atol=1e-4)
    assert not torch.allclose(here, guide.condition(y=longer.nan_to_num(7.0)).log_prob(padded), atol=1e-2)


def test_the_trace_of_a_conditioned_guide_has_the_density_that_log_prob_says():
    """Planted fault: a log-determinant of the wrong sign (the prior's units have sd 0.7) is off by 2 log 0.7 a group."""
    guide = trained(groups, 30, ["y"])
    posterior = guide.condition(y=torch.randn(3))
    trace = poutine.trace(posterior).get_trace()
    drawn = {k: trace.nodes[k]["value"] for k in ("mu", "theta")}
    assert torch.allclose(trace.log_prob_sum(), posterior.log_prob(drawn), atol=1e-4)
    assert torch.allclose(posterior.log_prob({k: v[None] for k, v in drawn.items()})[0], posterior.log_prob(drawn))


def spline(features, context):
    return dgm.NSF(features, context)


@pytest.mark.parametrize("bounds, family", [(None, None), (None, spline), ("map", None)])
def test_a_box_is_never_left_and_the_density_in_it_is_one(bounds, family):
    """Planted fault: without the constant of its mixtures the default family's integral is their mass in the box, 0.87."""
    guide = trained(boxed, 150, bounds=bounds, family=family)
    posterior = guide.condition(x=torch.tensor([0.9, -0.95]))
    t = posterior.sample((5000,))["t"]
    assert (t.abs() <= 1.0).all() and abs(float(t[:, 0].mean()) - 0.72) < 0.1  # the exact mean is 0.72
    many = guide.condition(x=torch.tensor([[0.9, -0.95], [0.0, 0.0]])).sample((2000,))["t"]
    assert (many.abs() <= 1.0).all() and abs(float(many[:, 0, 0].mean() - t[:, 0].mean())) < 0.03
    edges = torch.linspace(-1.0, 1.0, 201)
    middle = 0.5 * (edges[1:] + edges[:-1])
    grid = torch.stack(torch.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)
    whole = posterior.log_prob({"t": grid}).exp().sum() * 0.01**2
    assert abs(whole.item() - 1.0) < 0.02
    if bounds is None and family is None:
        assert posterior.log_prob({"t": torch.tensor([1.5, 0.0])}) == -torch.inf


def test_discrete_latents_have_their_exact_probabilities():
    """Planted fault: a head that does not see the data says the prior, 0.5, 0.3, 0.2."""
    guide = trained(kinds, 300)
    for x in (0.0, 1.5, 4.0):
        posterior = guide.condition(x=torch.tensor(x))
        exact = torch.softmax(torch.tensor([0.5, 0.3, 0.2]).log() - 0.5 * (x - 2.0 * torch.arange(3)) ** 2, 0)
        q = posterior.log_prob({"z": torch.arange(3)}).exp()
        assert torch.allclose(q, exact, atol=0.06)
        counts = torch.bincount(posterior.sample((2000,))["z"], minlength=3) / 2000
        assert torch.allclose(counts, q, atol=0.05) and posterior.sample()["z"].dtype == torch.long


def mixed(x=None):
    """A rare jump and a class beside a normal number."""
    jump = pyro.sample("jump", dist.Bernoulli(0.2))
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.5, 0.5])))
    m = pyro.sample("m", dist.Normal(3.0 * jump - 2.0 * kind, 1.0))
    return pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def test_discrete_latents_beside_continuous_ones():
    """P(jump, kind | x) and m | jump, kind, x, all exact. Planted fault: heads that do not see m, which lose their correlation."""
    guide = trained(mixed, 800)
    jump, kind = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).unbind(-1)
    mean = 3.0 * jump - 2.0 * kind
    for x in (-2.0, 1.0, 4.0):
        exact = torch.softmax(torch.where(jump > 0, 0.2, 0.8).log() - (x - mean) ** 2 / 4.0, 0)
        posterior = guide.condition(x=torch.tensor(x))
        draws = posterior.sample((6_000,))
        found = [(draws["jump"] == j) & (draws["kind"] == k) for j, k in zip(jump, kind, strict=True)]
        assert torch.allclose(torch.stack(found).double().mean(1), exact.double(), atol=0.07)
        for here, p, m in zip(found, exact, mean, strict=True):
            assert p < 0.15 or abs(draws["m"][here].mean() - (x + m) / 2.0) < 0.15
        m = torch.tensor((x + 3.0) / 2.0)
        given = {"jump": torch.tensor(1.0), "kind": torch.tensor(0), "m": m}
        wanted = exact[2].log() + dist.Normal(m, 0.5**0.5).log_prob(m)
        assert exact[2] < 0.15 or abs(posterior.log_prob(given) - wanted) < 0.3


def test_refinement_finds_the_evidence_and_the_posterior(normal_guide):
    """x is N(0, 2). Planted fault: weights without the guide's density miss the evidence by log q, about 1 nat."""
    x = torch.tensor(1.0)
    refined = normal_guide.condition(x=x).refine(4000, seed=0)
    exact = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(x))
    assert refined.good and abs(refined.log_evidence - exact) < 4.0 * refined.log_evidence_error + 1e-3
    mu = refined.draws["mu"]
    assert abs(mu.mean() - 0.5) < 0.04 and abs(mu.std() - math.sqrt(0.5)) < 0.04


def test_a_bad_guide_is_called_bad_and_chains_repair_the_draws(normal_guide):
    """Ten standard deviations of the data outside what was simulated. Planted fault: chains that accept everything give
    the guide's spread back."""
    x = torch.tensor(14.0)
    guide = dgm.AmortizedGuide(normal, ["x"])
    guide.load_state_dict(normal_guide.state_dict())
    guide.groups[0].family.offset -= 2.5
    with pytest.warns(UserWarning, match=r"k-hat is .* far from this data set's posterior"):
        refined = guide.condition(x=x).refine(2000, seed=0, steps=300)
    mu = refined.draws["mu"]
    assert not refined.good and abs(mu.mean() - 7.0) < 0.1 and abs(mu.std() - math.sqrt(0.5)) < 0.08
    assert refined.acceptance["differences"] > 0.05 and refined.moved > 0.9 and "k-hat" in str(refined)


def test_an_elbo_continues_what_simulations_began(normal_guide):
    """ForwardKL, then STL_ELBO on one datum: minus the bound reaches minus the log evidence."""
    x = torch.tensor(3.0)
    guide = dgm.AmortizedGuide(normal, ["x"])
    guide.load_state_dict(normal_guide.state_dict())
    for elbo in (dgm.STL_ELBO(32), dgm.IWAE_ELBO(8)):
        loss = dgm.fit(elbo(normal, guide), (x,), max_steps=60, lr=2e-3, progress=False, seed=0).loss[-20:]
        exact = -float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(x))
        assert abs(sum(loss) / 20 - exact) < 0.02


def test_an_elbo_of_a_hierarchy_trains_the_amortised_guide_alone():
    y = torch.tensor([0.3, 1.0, -0.5, 0.8, 0.1])
    guide = dgm.AmortizedGuide(groups, ["y"])
    dgm.fit(dgm.STL_ELBO(16)(groups, guide), (y,), max_steps=150, progress=False, seed=0)
    exact = 1.0 / (1.0 + 5.0 / (0.49 + 0.25)) * y.sum() / (0.49 + 0.25)
    assert abs(guide.condition(y=y).sample((4000,))["mu"].mean() - exact) < 0.1


def test_a_continuous_flow_is_matched():
    guide = trained(normal, 400, family=lambda features, context: dgm.FFJORD(features, context, hidden_features=16))
    mu = guide.condition(x=torch.tensor(2.0)).sample((2000,))["mu"]
    assert abs(mu.mean() - 1.0) < 0.15 and abs(mu.std() - math.sqrt(0.5)) < 0.12


def test_an_encoder_per_site_and_its_shape():
    def model(x=None):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(level[..., None, None].expand(*level.shape, 6, 6), 1.0).to_event(2), obs=x)

    conv = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3))
    guide = trained(model, 150, encoder=conv)
    assert guide.groups[0].context_features == 4
    x = torch.full((6, 6), 1.5) + torch.randn(6, 6)
    assert abs(guide.condition(x=x).sample((1000,))["level"].mean() - x.sum() / 37.0) < 0.25
    with pytest.raises(ValueError, match=r"encoder of 'x' maps \(1, 6, 6\) to \(1, 6, 2\); expected"):
        dgm.AmortizedGuide(model, ["x"], encoder={"x": nn.Linear(6, 2)})
    with pytest.raises(ValueError, match=r"encoder=\['z'\] names no observed site"):
        dgm.AmortizedGuide(model, ["x"], encoder={"z": nn.Linear(6, 2)})


def test_a_hierarchy_of_ragged_groups_against_the_grid():
    """Planted fault: local effects in plain units (PriorUnits that find no site) give ESS below 5 % after this training."""
    guide = dgm.AmortizedGuide(bench.hierarchy, ["y"], args=(torch.ones(16),), covariates=["sigma"])
    assert [s.name for s in guide.prior.sites] == ["theta"]
    dgm.fit(dgm.ForwardKL(guide, batch_size=64, inputs=bench.inputs), max_steps=150, progress=False, seed=0)
    found = bench.compared(guide, 4, sets=1, draws=1000)
    assert found["ess"] > 0.1
    assert (
        max(found["refined |mean error| / sd"]) < 0.15 and max(abs(r - 1.0) for r in found["refined sd ratio"]) < 0.15
    )


def test_pyro_and_arviz_take_the_posterior(normal_guide):
    posterior = normal_guide.condition(x=torch.tensor(1.0))
    assert Predictive(posterior.model, guide=posterior, num_samples=5)()["mu"].shape == (5,)
    importance = Importance(posterior.model, posterior, num_samples=200).run()
    assert abs(importance.get_log_normalizer() - dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0))) < 0.05
    idata = dgm.from_svi(posterior.model, posterior, num_samples=200, prior=0, seed=0, container="dict")
    assert dgm.khat(idata).k < 0.7
    start = init_to_value(values=posterior.sample())
    chain = MCMC(NUTS(posterior.model, init_strategy=start), num_samples=5, warmup_steps=5, disable_progbar=True)
    chain.run()
    assert chain.get_samples()["mu"].shape == (5,)


def random_size(y=None):
    """The number of groups is data, and random: simulations run one by one, and are padded."""
    more = pyro.sample("more", dist.Binomial(4, 0.5))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", int(more) + 2):
        theta = pyro.sample("theta", dist.Normal(mu, 0.7))
        return pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


@pytest.mark.filterwarnings("ignore:The model cannot run many draws at once")
def test_plates_of_random_size_are_learned_from_padded_simulations():
    """Planted fault: padding that counts as data moves the mean by 0.45."""
    sims = dgm.simulate(random_size, 400, observed=("more", "y"), seed=0, progress=False)
    guide = dgm.AmortizedGuide(random_size, ["more", "y"])
    dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=0, max_epochs=10)
    y = torch.tensor([1.5, 2.0, 1.2, 1.8])
    posterior = guide.condition(more=torch.tensor(2.0), y=y)
    exact = y.sum() / 0.74 / (1.0 + 4 / 0.74)
    draws = posterior.sample((1000,))
    assert draws["theta"].shape == (1000, 4) and abs(draws["mu"].mean() - exact) < 0.25
    refined = posterior.refine(500, seed=0)
    assert refined.good and abs(refined.draws["mu"].mean() - exact) < 0.08


class Narrow:
    """An amortised posterior whose draws are pulled to their mean."""

    def __init__(self, guide, factor):
        self.guide, self.factor = guide, factor

    def condition(self, **data):
        self.posterior = self.guide.condition(**data)
        return self

    def sample(self, shape):
        return {k: v.mean(0) + self.factor * (v - v.mean(0)) for k, v in self.posterior.sample(shape).items()}


@pytest.mark.parametrize("model", [normal, groups, boxed], ids=lambda m: m.__name__)
def test_calibration_accepts_the_guide_and_rejects_a_narrow_one(model):
    """The planted fault is the test: standard deviations times 0.7."""
    name = "y" if model is groups else "x"
    guide = trained(model, 250, [name], seed=1)
    options = {"observed": [name], "num_simulations": 300, "num_draws": 49, "seed": 0}
    assert dgm.sbc(model, Narrow(guide, 1.0), **options).p_value > 1e-3
    assert dgm.sbc(model, Narrow(guide, 0.7), **options).p_value < 1e-4


KILLED = """
    import sys, time, torch, pyro, pyro_dgm as dgm
    from tests.amortized.test_amortized import normal
    torch.set_num_threads(1)
    sims = dgm.simulate(normal, 1000, observed=("x",), seed=0, progress=False)
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(normal, ["x"])
    objective = dgm.ForwardKL(guide)
    if {slow}:
        inner = objective.forward
        objective.forward = lambda *a: (time.sleep(0.1), inner(*a))[1]
    history = dgm.fit(objective, sims, seed=0, max_epochs=6, progress=False, checkpoint=sys.argv[1])
    torch.save([history.loss, history.validation, dict(guide.state_dict())], sys.argv[2])
"""


def test_training_that_is_killed_resumes_to_the_same_bits(tmp_path):
    """The running average of the weights included. Planted fault: an average that starts anew after the resume."""

    def start(name, slow):
        code = textwrap.dedent(KILLED).format(slow=slow)
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / f"{name}.out")])

    assert start("whole", False).wait() == 0
    cut = start("cut", True)
    while not (tmp_path / "cut").exists():
        time.sleep(0.05)
        assert cut.poll() is None
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    assert start("cut", False).wait() == 0
    (loss, held_out, state), (again, held_out_again, resumed) = (
        torch.load(tmp_path / f"{n}.out") for n in ("whole", "cut")
    )
    assert loss == again and len(loss) > 100
    assert held_out == held_out_again  # of the averages
    assert all(torch.equal(v, resumed[k]) for k, v in state.items())


def test_a_guide_is_saved_with_its_units(normal_guide, tmp_path):
    torch.save(normal_guide.state_dict(), tmp_path / "guide.pt")
    other = dgm.AmortizedGuide(normal, ["x"])
    other.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    draw, x = {"mu": torch.tensor(0.3)}, torch.tensor(1.0)
    assert torch.equal(other.condition(x=x).log_prob(draw), normal_guide.condition(x=x).log_prob(draw))


def loose(x=None):
    t = pyro.sample("t", dist.Normal(torch.zeros(3), 1.0))
    return pyro.sample("x", dist.Normal(t.sum(-1), 1.0), obs=x)


def counted(x=None):
    k = pyro.sample("k", dist.Poisson(3.0))
    return pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def endless(x=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(pyro.sample("s", dist.Delta(t / 0.0)), 1.0), obs=x)


@pytest.mark.parametrize(
    "model, options, message",
    [
        (normal, {"observed": ["y"]}, r"\['y'\] is no sample site of the model, whose sites are \['mu', 'x'\]"),
        (normal, {"observed": []}, "nothing is no sample site"),
        (normal, {"observed": ["mu", "x"]}, "no latent site besides observed"),
        (normal, {"observed": "x", "bounds": "truncate"}, "bounds='truncate', expected 'map' or None. The default family keeps"),
        (normal, {"observed": "x", "covariates": ["n"]}, "covariate 'n' is no tensor among the prototype's arguments"),
        (normal, {"observed": "x", "family": lambda d, c: dgm.MAF(d)}, r"0 context features for latents \['mu'\]; expected"),
        (loose, {"observed": "x"}, r"'t' has batch shape \(3,\), and dimension\(s\) \[-1\] are in no plate"),
        (counted, {"observed": "x"}, "discrete latent site 'k' has support .*expected Bernoulli, Categorical or"),
        (endless, {"observed": "x"}, "latent site 's' from its prior are not finite; .* needs a proper prior"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_amortised_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        dgm.AmortizedGuide(model, **options)


def test_bad_data_are_refused(normal_guide):
    guide = dgm.AmortizedGuide(groups, ["y"])
    with pytest.raises(ValueError, match=r"\['y'\] missing and \['x'\] unknown; expected the observed sites"):
        guide.condition(x=torch.zeros(5))
    with pytest.raises(ValueError, match=r"\['z'\] unknown"):
        guide.condition(y=torch.zeros(5), z=torch.zeros(5))
    with pytest.raises(ValueError, match="'y' holds 1 NaN or infinite entries. Pass what is missing as a mask"):
        guide.condition(y=torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"'y' has shape \(\), expected \(size of 'group'\)"):
        guide.condition(y=torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"'x' has shape \(3,\), expected \(2\)"):
        dgm.AmortizedGuide(boxed, ["x"]).condition(x=torch.zeros(3))
    many = normal_guide.condition(x=torch.zeros(4))
    with pytest.raises(ValueError, match="refined, but it was conditioned on many data sets at once"):
        many.refine()
    with pytest.raises(ValueError, match=r"latent sites \['mu'\] are missing; got \['m'\]"):
        many.log_prob({"m": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"called without \['x'\]"):
        normal_guide()


def test_bad_training_is_refused(normal_guide):
    with pytest.raises(TypeError, match="AutoFlow is not amortised"):
        dgm.ForwardKL(dgm.AutoFlow(normal))
    with pytest.raises(ValueError, match=r"the simulations hold \['x'\], without \['mu'\]"):
        dgm.ForwardKL(normal_guide)({"x": torch.zeros(4)})
    guide = dgm.AmortizedGuide(bench.hierarchy, ["y"], args=(torch.ones(16),), covariates=["sigma"])
    with pytest.raises(ValueError, match=r"fresh simulations need covariates \['sigma'\]"):
        dgm.ForwardKL(guide)()
    with pytest.raises(ValueError, match="one encoder for observed"):
        dgm.AmortizedGuide(uniform_pair, ["x", "y"], encoder=nn.Identity())

    def single(x=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(float(mu), 1.0), obs=x)

    with pytest.raises(ValueError, match="cannot simulate many data sets at once .* Simulate beforehand"):
        dgm.ForwardKL(dgm.AmortizedGuide(single, ["x"]))()


def uniform_pair(x=None, y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(t, 1.0), obs=x)
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def test_a_density_that_vanishes_everywhere_is_said(normal_guide):
    guide = dgm.AmortizedGuide(boxed, ["x"])

    def elsewhere(x=None):
        t = pyro.sample("t", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
        pyro.factor("nowhere", -torch.inf * torch.ones(t.shape[:-1]))
        return pyro.sample("x", dist.Normal(t, 0.3).to_event(1), obs=x)

    guide.arguments.model = elsewhere
    with warnings.catch_warnings(), pytest.raises(ValueError, match="density is zero or NaN at all 200 draws"):
        warnings.simplefilter("ignore")
        guide.condition(x=torch.zeros(2)).refine(50)
