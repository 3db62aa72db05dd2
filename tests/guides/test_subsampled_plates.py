"""Latents in subsampled plates: the guide holds those of all rows, and is the guide of the model without a subsample."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.infer.reparam import LocScaleReparam

import pyro_dgm as dgm
from pyro_dgm.core.upstream import whole_plates
from pyro_dgm.diagnostics.loo import elpd_of
from pyro_dgm.model.handlers import Given
from pyro_dgm.model.log_joint import LogJoint
from tests.benchmarks.hierarchies import drawn, hierarchy

J, PART = 60, 25  # which does not divide 60


def by_subsample(at_once):
    """The hierarchy with ``pyro.subsample`` in the place of an index."""

    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(2.0))
        with pyro.plate("group", len(y), subsample_size=at_once):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            own, seen = pyro.subsample(sigma, event_dim=0), pyro.subsample(y, event_dim=0)
            pyro.sample("y", dist.Normal(theta, own), obs=seen)

    return model


def positive(at_once):
    """Latents whose Jacobians differ from row to row."""

    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(y), subsample_size=at_once) as i:
            rate = pyro.sample("rate", dist.Gamma(mu.exp(), 1.0))
            pyro.sample("y", dist.Normal(rate, sigma[i]), obs=y[i])

    return model


MAKERS = {
    "index": lambda at_once: hierarchy(at_once=at_once),
    "non-centred": lambda at_once: hierarchy(centred=False, at_once=at_once),
    "subsample": by_subsample,
}
MODELS = {name: make(PART) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def data():
    return drawn("normal", J, 3)


def fitted(model, *args, **options):
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model, **options)
    dgm.fit(dgm.STL_ELBO()(model, guide), args, seed=0, progress=False, max_steps=3)
    return guide


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:loo:UserWarning")  # one datum in a group moves it
def test_it_is_the_posterior_of_the_model_without_a_subsample(data, name):
    """Planted: a start with the subsamples of the model in the place of all rows, for which no number is the same."""
    found = []
    for model in (hierarchy(centred=name != "non-centred"), MODELS[name]):
        guide = fitted(model, *data)
        idata = dgm.from_svi(model, guide, *data, seed=0, prior=0, num_samples=200)
        found.append((guide.draws(4, *data), idata, dgm.khat(idata)))
    (_, whole, verdict), (draws, idata, of_parts) = found
    for site in idata.posterior.data_vars:
        torch.testing.assert_close(
            *(torch.as_tensor(d.posterior[site].values) for d in (idata, whole)), rtol=1e-3, atol=1e-3
        )
    assert of_parts.status == "good" and abs(of_parts.log_evidence - verdict.log_evidence) < 0.01
    assert of_parts.rows.plate == "group" and of_parts.rows.total == J
    assert draws["mu"].shape == (4,) and all(v.shape == (4, J) for k, v in draws.items() if k in ("theta", "eta"))
    assert elpd_of(dgm.loo(idata)) == pytest.approx(elpd_of(dgm.loo(whole)), abs=0.1)


def test_hidden_sites_and_reparametrised_ones_are_no_rows_that_hang_together(data):
    """Planted: other draws of a hidden site with all rows than by subsamples, which then differ."""
    hidden = poutine.block(MODELS["index"], hide=["tau"])
    assert dgm.AutoFlow(hidden, structure="joint").setup(*data).latent_dim == 1 + J
    guide = dgm.AutoFlow(MODELS["index"], reparam={"theta": LocScaleReparam()}).setup(*data)
    assert guide.follows_plates and guide.latent_dim == 2 + J
    pyro.clear_param_store()


def test_a_run_of_the_guide_has_the_rows_of_a_subsample(data):
    """Planted: the first rows in the place of those of the index."""
    model = MODELS["index"]
    guide = fitted(model, *data)
    trace = poutine.trace(guide).get_trace(*data)
    index = trace.nodes["group"]["value"]
    latent = next(s["value"] for k, s in trace.nodes.items() if k.endswith("_latent"))
    whole = guide.constrained(latent[None], *data)["theta"][0]
    assert len(index) == PART and torch.equal(trace.nodes["theta"]["value"], whole[index])
    assert trace.nodes["theta"]["cond_indep_stack"][0].size == PART
    shapes = {k: tuple(v.shape) for k, v in Predictive(model, guide=guide, num_samples=4)(*data).items()}
    assert shapes["theta"] == (4, PART) and shapes["y"] == (4, PART)


@pytest.mark.parametrize("make", [*MAKERS.values(), positive])
def test_the_bound_of_a_step_of_svi_has_no_bias(data, make):
    """The mean of two halves of the rows is the bound with all rows, to the last digits.

    Planted: Jacobians of the first rows in the place of those of the subsample.
    """
    model = make(J // 2)
    guide = dgm.AutoFlow(model).setup(*data)
    halves = torch.randperm(J, generator=torch.Generator().manual_seed(0)).split(J // 2)
    with torch.no_grad():
        q = guide.get_posterior(*data)
        u = q.sample()
        whole = float(LogJoint(guide, make(None), data, {})(u[None]) - q.log_prob(u))
        latent = f"_{guide._pyro_name}_latent"
        bounds = [float(_bound(model, guide, data, {latent: u, "group": rows})) for rows in halves]
    assert abs(sum(bounds) / 2 - whole) < 2e-3
    assert abs(bounds[0] - bounds[1]) > 0.1


def _bound(model, guide, args, values):
    q = poutine.trace(Given(values)(guide)).get_trace(*args)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*args)
    return p.log_prob_sum() - q.log_prob_sum()


def test_stock_svi_trains_it(data):
    model = MODELS["index"]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = dgm.AutoFlow(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(16, vectorize_particles=True))
    losses = [svi.step(*data) for _ in range(200)]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    pyro.clear_param_store()


def test_states_copies_and_pickles(data):
    """Planted: sizes of subsamples that a copy forgets; its runs then have all rows."""
    model = MODELS["index"]
    guide = fitted(model, *data)
    other = dgm.AutoFlow(model).setup(*data)
    other.load_state_dict(guide.state_dict())
    u = guide.get_posterior(*data).sample((3,))
    expected = guide.get_posterior(*data).log_prob(u)
    for same in (other, copy.deepcopy(guide)):
        assert torch.equal(same.get_posterior(*data).log_prob(u), expected)
        assert same(*data)["theta"].shape == (PART,)
    assert torch.equal(pickle.loads(pickle.dumps(guide)).get_posterior(*data).log_prob(u), expected)


# --- Which models ---


def test_nested_plates_lie_whole_in_their_elements():
    sigma, y = (x.reshape(20, 3) for x in drawn("normal", 60, 1))

    def nested(sigma, y, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("group", 20, subsample_size=size, dim=-2) as i:
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            with pyro.plate("item", 3, dim=-1):
                phi = pyro.sample("phi", dist.Normal(theta, 0.5))
                pyro.sample("y", dist.Normal(phi, sigma[i]), obs=y[i])

    pyro.set_rng_seed(0)
    guide = dgm.AutoFlow(nested)
    guide.warm_start(sigma, y, 8)
    assert guide.plated.groups[0].index.shape == (20, 4)
    assert guide(sigma, y, 8)["phi"].shape == (8, 3)
    verdict = dgm.khat(dgm.from_svi(nested, guide, sigma, y, 8, seed=0, prior=0))
    within = torch.diag_embed(sigma.square() + 0.25) + 1.0
    evidence = float(dist.MultivariateNormal(torch.zeros(60), torch.block_diag(*within) + 25.0).log_prob(y.reshape(-1)))
    assert abs(verdict.log_evidence - evidence) < 0.05 and verdict.status in ("good", "exact")


@pytest.mark.parametrize("structure", ["auto", "joint"])
def test_few_elements_and_a_wish_for_one_flow_have_one_over_all_rows(structure):
    sigma, y = drawn("normal", 6 if structure == "auto" else 12, 1)
    model = hierarchy(at_once=4)
    guide = fitted(model, sigma, y, structure=structure)
    whole = fitted(hierarchy(), sigma, y, structure=structure)
    assert not guide.follows_plates and guide.latent_dim == 2 + len(y)
    evidence = [
        dgm.khat(dgm.from_svi(m, g, sigma, y, seed=0, prior=0)).log_evidence
        for m, g in ((model, guide), (hierarchy(), whole))
    ]
    assert abs(evidence[0] - evidence[1]) < 0.1
    assert guide(sigma, y)["theta"].shape == (4,)


def batch_in_the_place_of_data(sigma, y):
    with pyro.plate("group", 1000, subsample_size=len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def mean_over_a_subsample(sigma, y):
    with pyro.plate("group", len(y), subsample_size=PART) as i:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta - theta.mean(-1, keepdim=True), sigma[i]), obs=y[i])


def given_index(sigma, y):
    index = torch.arange(PART)
    with pyro.plate("group", len(y), subsample=index):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma[index]), obs=y[index])


def loop(sigma, y):
    for i in pyro.plate("group", len(y), subsample_size=PART):
        theta = pyro.sample(f"theta_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(theta, sigma[i]), obs=y[i])


def without_globals(sigma, y):
    with pyro.plate("group", len(y), subsample_size=PART) as i:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma[i]), obs=y[i])


def crossed(sigma, y):
    """Either plate could be followed; the other then holds globals."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("column", 30):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y), subsample_size=PART) as i:
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(a + b[..., (7 * i) % 30], sigma[i]), obs=y[i])


def test_the_subsampled_one_of_crossed_plates_is_followed(data):
    """Planted: the first plate of the model is followed, and the latents of all rows are globals."""
    guide = dgm.AutoFlow(crossed).setup(*data)
    assert [each.plate for each in guide.plated.groups] == ["group"] and guide.plated.size == 31


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (batch_in_the_place_of_data, "'group' are not independent, or its data do not follow the index.*it fails"),
        (mean_over_a_subsample, "'group' are not independent.*its log joint is .*, by subsamples"),
        (given_index, "plate 'group' is subsampled by subsample=, or made outside of the model"),
        (loop, "a loop over a subsample"),
        (
            without_globals,
            "site 'theta' lies in a subsampled plate, but all of its latents are in plates. Use structure=",
        ),
    ],
)
def test_models_that_cannot_be_run_whole_are_refused(data, model, said):
    """Planted: no comparison of rounds with all rows, and the mean over a subsample is fitted as if it were one of all rows."""
    with pytest.raises(ValueError, match=said):
        dgm.AutoFlow(model).setup(*data)


def test_other_guides_say_that_they_cannot(data):
    with pytest.raises(ValueError, match=r"'group', which is subsampled \(25 of 60\).*AutoFlow"):
        dgm.ImplicitGuide(MODELS["index"]).setup(*data)
    parts = AutoGuideList(MODELS["index"], create_plates=lambda *_: pyro.plate("group", J, subsample_size=PART))
    parts.append(dgm.AutoFlow(poutine.block(MODELS["index"], hide=["tau"])))
    with pytest.raises(ValueError, match="an AutoFlow that is no part of a list"):
        parts(*data)


def test_plates_are_whole_only_where_that_is_asked():
    """Planted: a flag that stays on after an error."""
    sizes = []

    def model():
        with pyro.plate("group", 10, subsample_size=3) as i:
            sizes.append(len(i))
            raise KeyError

    for wanted in (False, True):
        with pytest.raises(KeyError), whole_plates(wanted):
            model()
    with pytest.raises(KeyError):
        model()
    assert sizes == [3, 10, 3]
    with whole_plates(), pyro.plate("group", 10, subsample=torch.arange(2)) as i:
        assert len(i) == 2
